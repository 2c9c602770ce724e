"""`python -m benchmarks.serving`: images per second and waiting times of `jobs.serve` on loopback, by clients.

A preset of random weights is served by one replica. Each client is a thread with a connection that sends the next
image when it has the answer to the last one. Before each number of clients and after the last, this process runs the
model alone on the same images. Processor time of the server's processes counts beside the wall clock, because other
work on the machine does not change it much.
"""

import argparse
import http.client
import io
import json
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image

from benchmarks.serving_process import PROXY, REPLICA, ServerProcess, start_server
from jobs.cli import CommandParser, Parser, main
from jobs.presets import find_config
from pipeline.checkpoint import TrainState, load_inference, save
from pipeline.config import dump, load_config
from pipeline.data.index import Category
from pipeline.inference.predictor import Limits, Predictor, read_image
from pipeline.model import build_model

IMAGES = 8  # different ones, sent in turns
BOUNDARY = "frontier"
HEAD = """\
| clients | images/s | p50 ms | p99 ms | model alone ms | processor ms: model alone | replica | proxy | share |
|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Load:
    """One number of clients."""

    clients: int
    images_per_s: float
    p50_ms: float
    p99_ms: float
    alone_ms: float  # wall time of the model alone on an image, beside the same other work
    alone_cpu_ms: float  # the same, processor time
    replica_cpu_ms: float  # of the replica per image
    proxy_cpu_ms: float


def write_checkpoint(folder: Path, preset: str, overrides: list[str]) -> Path:
    """A checkpoint of random weights."""
    settings = ["model.backbone.weights=none", "model.num_classes=5", *overrides]
    config = load_config(find_config(preset), settings)
    torch.manual_seed(0)
    model = build_model(config.model, load_backbone=False)
    classes = config.model.num_classes
    assert isinstance(classes, int), "there are no data to count the classes of"
    categories = tuple(Category(k + 1, f"class {k + 1}") for k in range(classes))
    save(folder / "checkpoint", TrainState(dump(config), categories, "", 1, 0, 1, 1), model.state_dict(), {})
    return folder / "checkpoint"


def draw_files(size: tuple[int, int]) -> list[bytes]:
    """JPEG files of smooth noise, `size` = (width, height)."""
    files = []
    for seed in range(IMAGES):
        small = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def time_alone(predictor: Predictor, files: list[bytes]) -> tuple[float, float]:
    """Median wall and processor seconds of the model alone on an image, which is in memory as the model takes it."""
    items = [predictor.prepare(read_image(file)) for file in files]
    wall, processor = [], []
    for item in [items[0], *items * 2]:
        start, used = time.perf_counter(), time.process_time()
        predictor.detect_batch([item], [Limits(0.3, 100)])
        wall.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    return statistics.median(wall[1:]), statistics.median(processor[1:])


def send_for(server: ServerProcess, files: list[bytes], clients: int, seconds: float) -> tuple[list[float], float]:
    """Seconds of each answer, and of all together."""
    waits: list[float] = []
    faults: list[str] = []
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=120)
        turn = number
        while time.perf_counter() < end and not faults:
            start = time.perf_counter()
            headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
            connection.request("POST", "/v1/predict", _form(files[turn % len(files)]), headers)
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200:
                faults.append(f"{answer.status} {body[:200]!r}")
            waits.append(time.perf_counter() - start)
            turn += 1

    start = time.perf_counter()
    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise RuntimeError(f"an answer was {faults[0]}")
    return waits, time.perf_counter() - start


def measure(server: ServerProcess, predictor: Predictor, files: list[bytes], clients: int, seconds: float) -> Load:
    """Load the server, between two looks at the model alone."""
    before = time_alone(predictor, files)
    used = _processor_seconds(server)
    waits, whole = send_for(server, files, clients, seconds)
    replica, proxy = (now - then for now, then in zip(_processor_seconds(server), used, strict=True))
    after = time_alone(predictor, files)
    alone, alone_cpu = (1e3 * (a + b) / 2 for a, b in zip(before, after, strict=True))
    p50, p99 = (1e3 * float(np.quantile(waits, q)) for q in (0.5, 0.99))
    each = 1e3 / len(waits)
    return Load(clients, len(waits) / whole, p50, p99, alone, alone_cpu, replica * each, proxy * each)


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("benchmarks.serving", (__doc__ or "").splitlines()[0], "python -m benchmarks.serving")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top of the preset")
    parser.add_argument("--preset", default="demo", help="preset; default %(default)s")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16], help="numbers of clients; default 1 4 16")
    parser.add_argument("--seconds", type=float, default=10, help="of each number of clients; default %(default)s")
    parser.add_argument("--size", type=int, nargs=2, default=[640, 480], help="of the images; default 640 480")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint, files = write_checkpoint(folder, args.preset, args.overrides), draw_files(tuple(args.size))
        predictor = Predictor(load_inference(checkpoint), "cpu")
        with start_server(checkpoint, folder / "log") as server:
            send_for(server, files, max(args.clients), 2)  # warms up
            print(HEAD)
            for clients in args.clients:
                row = measure(server, predictor, files, clients, args.seconds)
                rows.append(asdict(row))
                print(_line(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def _line(row: Load) -> str:
    share = row.alone_cpu_ms / (row.replica_cpu_ms + row.proxy_cpu_ms)
    return (
        f"| {row.clients} | {row.images_per_s:.1f} | {row.p50_ms:.0f} | {row.p99_ms:.0f} | {row.alone_ms:.0f} | "
        f"{row.alone_cpu_ms:.1f} | {row.replica_cpu_ms:.1f} | {row.proxy_cpu_ms:.1f} | {share:.0%} |"
    )


def _form(file: bytes) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
    return head.encode() + file + f"\r\n--{BOUNDARY}--\r\n".encode()


def _processor_seconds(server: ServerProcess) -> tuple[float, float]:
    """Of the replicas and of the proxy, so far."""
    used = []
    for title in (REPLICA, PROXY):
        times = [process.cpu_times() for process in server.processes(title)]
        used.append(sum(each.user + each.system for each in times))
    return used[0], used[1]


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))
