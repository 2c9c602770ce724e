"""A sweep from its start to its end: checks, MLflow's parent run, trials, table, the best config as a file."""

import shlex
from dataclasses import replace

from pipeline.errors import PreemptedError
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.run import finish_run, start_run
from tune.results.listing import list_exchanges, list_outcomes
from tune.results.outcomes import best, best_config, find_best, outcomes_of, write_best
from tune.trials.check import CheckedSweep
from tune.trials.lock import WriteLedger
from tune.trials.run import prepare, run_trials

CONTINUE = "continue the sweep by the same command with --resume"


def sweep(checked: CheckedSweep, write: WriteLedger) -> None:
    """Run a sweep, or continue one; its best config is written into its folder.

    Args:
        checked: the sweep.
        write: writes its ledger, see `hold_sweep`.

    Raises:
        ResourceError: it does not fit into the cluster; nothing was written.
        PreemptedError: SIGTERM; it can be continued.
        SweepError: all trials failed or have no score, Ray ended, or another process runs the sweep.
        KeyboardInterrupt: Ctrl-C; it can be continued.
    """
    prepared = prepare(checked)
    space, ledger = prepared.space, prepared.ledger
    config, folder = space.base, space.base.storage
    tags = {"sweep": space.search.model_dump_json()}
    run_id = start_run(config.tracking, config, config.name, resume_run_id=ledger.run_id, tags=tags)
    run_id = run_id or ledger.run_id  # MLflow may not answer; the old run's id is kept for when it does
    ledger = replace(ledger, run_id=run_id)
    write(folder, ledger)
    status = "FAILED"
    try:
        ledger = run_trials(space, ledger, run_id, write=write)
        outcomes = outcomes_of(space, ledger)
        listing = "\n".join(filter(None, [list_outcomes(space, outcomes), list_exchanges(ledger)]))
        print(f"\n{listing}")
        interrupted = any(outcome.status == "interrupted" for outcome in outcomes)
        status = "KILLED" if interrupted else status
        if interrupted and find_best(outcomes) is None:
            raise KeyboardInterrupt(CONTINUE)  # Ray handled the signal and ended the trials; the exit code must show it
        winner = best(outcomes)
        path = write_best(space, winner, folder)
        print(f"\nbest: {winner.name}, {space.search.metric} {winner.score:.4f}")
        print(f"train it in full: {shlex.join(['python', '-m', 'jobs.train', path])}")
        with RunLogger(config.tracking.uri, run_id) as logger:
            logger.metrics({space.search.metric: winner.score or 0.0}, step=winner.epochs)
            logger.text(listing, "trials.txt")
            logger.text(best_config(space, winner), "best.yaml")
        if interrupted:
            raise KeyboardInterrupt(CONTINUE)
        status = "FINISHED"
    except PreemptedError:
        status = "PREEMPTED"
        raise
    finally:
        finish_run(config.tracking.uri, run_id, status)
