"""Splits that are made: shares, strata, copies together, and nothing that depends on the order or the machine."""

import hashlib
from collections import Counter
from fractions import Fraction
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from support.layouts import draw_truth, stored, write_label_studio_coco

from pipeline.data.importing.build import build_dataset
from pipeline.data.importing.dataset import Options
from pipeline.data.importing.splitting import Candidate, deal_out

SHARES = {"train": Fraction(8, 10), "val": Fraction(1, 10), "test": Fraction(1, 10)}


def digest(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


CANDIDATES = st.lists(
    st.builds(Candidate, st.integers(0, 40).map(digest), st.frozensets(st.integers(1, 4), max_size=3)), max_size=80
)


@given(candidates=CANDIDATES, order=st.randoms(use_true_random=False), share=st.sampled_from(["0.05", "0.1", "0.25"]))
@settings(max_examples=100, deadline=None)
def test_deal_out_keeps_copies_together_whatever_the_order(
    candidates: list[Candidate], order: object, share: str
) -> None:
    part = Fraction(share)
    shares = {"train": 1 - 2 * part, "val": part, "test": part}
    chosen = deal_out(candidates, shares)
    by_digest: dict[str, set[str]] = {}
    for one, split in zip(candidates, chosen, strict=True):
        by_digest.setdefault(one.digest, set()).add(split)
    assert all(len(splits) == 1 for splits in by_digest.values())
    positions = list(range(len(candidates)))
    order.shuffle(positions)  # type: ignore[attr-defined]
    assert deal_out([candidates[k] for k in positions], shares) == [chosen[k] for k in positions]
    largest = max(Counter(one.digest for one in candidates).values(), default=0)
    for name, wanted in shares.items():
        assert abs(chosen.count(name) - wanted * len(candidates)) <= 2 * largest


def test_deal_out_rare_class_reaches_every_split() -> None:
    candidates = [Candidate(digest(k), frozenset({1} if k % 10 else {1, 2})) for k in range(200)]
    chosen = deal_out(candidates, SHARES)
    assert Counter(chosen) == {"train": 160, "val": 20, "test": 20}
    rare = Counter(split for one, split in zip(candidates, chosen, strict=True) if 2 in one.classes)
    assert rare == {"train": 16, "val": 2, "test": 2}


def test_made_splits_never_share_an_image_and_do_not_depend_on_its_name(tmp_path: Path) -> None:
    truth = draw_truth({"train": 30})
    found = []
    for number, mark in enumerate(("", "z")):
        root = tmp_path / f"{number}"
        write_label_studio_coco(truth, root / "export")
        for path in sorted((root / "export/images").iterdir())[:10]:
            path.with_name(f"copy of {path.name}").write_bytes(path.read_bytes())
        text = (root / "export/result.json").read_text()
        (root / "export/result.json").write_text(text.replace("images\\\\pic", f"images\\\\{mark}pic"))
        for path in (root / "export/images").iterdir():
            path.rename(path.with_name(mark + path.name))
        splits = build_dataset(str(root / "export"), root / "out", Options(split=0.2))
        assert list(splits) == ["train", "val", "test"]
        found.append({name: set(stored(root / "out" / name)) for name in splits})
    assert found[0] == found[1]
    assert sum(map(len, found[0].values())) == len(set.union(*found[0].values())) == 30
