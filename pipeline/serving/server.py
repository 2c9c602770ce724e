"""A server from its start to its end: the model is loaded once before Ray starts, then replicas serve until a signal.

Raises InputErrors and TrackingErrors before anything is started. A cluster that is too small is a ResourceError,
replicas that do not start are a ServingError.
"""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import ScalingConfig
from pipeline.config.serving import ServingConfig
from pipeline.errors import ConfigError, InputError, ResourceError, ServingError, StorageError
from pipeline.files.atomic import write_file
from pipeline.logs import get_logger
from pipeline.serving.arguments import TOKEN, Arguments, check_packages, check_reach, read_token, short_name

NAME = "detector"  # of the application in Ray Serve
BUILDER = "pipeline.serving.deployment:build"
POLL_SECONDS = 2.0
MARGIN = 5.0  # seconds by which Ray Serve's own limit of time is later than the guard's
HEADER = f"""\
# For `serve deploy`, see docs/serving.md. The nodes need this package, the variable {TOKEN} if needs_token is true, and
# whatever the model's address needs.
"""

log = get_logger("serving")


def check_request(
    model: str, settings: ServingConfig, tracking_uri: str | None, without_token: bool, local: bool
) -> Arguments:
    """Check all that can be wrong without Ray; loads the model once.

    Args:
        model: as `load_detector` takes it. An alias or a run is resolved now, so that all replicas have one model.
        settings: of the server.
        tracking_uri: `--tracking-uri`.
        without_token: whether others may use the server without a token.
        local: whether a server is started now; without RAY_ADDRESS this machine will listen.

    Raises:
        InputError, TrackingError: with what to do.
    """
    check_packages()
    needs_token = check_reach(settings, without_token)
    if local and not os.environ.get("RAY_ADDRESS"):
        _check_port(settings)
    from pipeline.registry.load import load_detector  # not at the top: PyTorch takes seconds
    from pipeline.registry.locate import pin_model

    pinned, store = pin_model(model, tracking_uri)
    load_detector(pinned, device="cpu", tracking_uri=store)
    gpu = settings.use_gpu is True
    return Arguments(
        model=pinned,
        name=short_name(model),
        tracking_uri=store,
        gpu=gpu,
        needs_token=needs_token,
        settings=settings,
    )


def write_serve_config(arguments: Arguments, path: Path) -> None:
    """Write the config file of a cluster.

    Raises:
        ConfigError: `use_gpu` is `auto`, which only a running cluster can decide.
        StorageError: the file cannot be written.
    """
    settings = arguments.settings
    if settings.use_gpu == "auto":
        raise ConfigError("--write-config does not see the cluster: say --use-gpu true or --use-gpu false")
    document = {
        "proxy_location": "EveryNode",
        "http_options": http_options(settings),
        "applications": [
            {
                "name": NAME,
                "route_prefix": "/",
                "import_path": BUILDER,
                "args": arguments.model_dump(mode="json"),
            }
        ],
    }
    try:
        write_file(path, (HEADER + yaml.safe_dump(document, sort_keys=False)).encode())
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; choose another --write-config") from None


def http_options(settings: ServingConfig) -> dict[str, Any]:
    """Ray Serve's options of its proxies."""
    host = "127.0.0.1" if settings.host == "localhost" else settings.host
    return {"host": host, "port": settings.port, "request_timeout_s": settings.timeout_s + MARGIN}


def run_server(arguments: Arguments) -> None:
    """Serve until SIGTERM, on the cluster at RAY_ADDRESS or on this machine.

    Raises:
        KeyboardInterrupt: Ctrl-C; everything is stopped.
        ResourceError: the cluster has no room for the replicas.
        ServingError: the cluster serves something already, or at another address; the replicas do not start, or nothing
            serves any more.
    """
    settings, own, ours = arguments.settings, not os.environ.get("RAY_ADDRESS"), False
    starts = own  # Ray Serve itself
    read_token(arguments.needs_token)
    if own:
        from pipeline.serving.proxy import environment

        os.environ.update(environment(settings))
    import ray
    from ray import serve

    from pipeline.launch.cluster import resolve_gpu, start_ray

    with _sigterm() as stopped:
        try:
            start_ray()
            scaling = ScalingConfig(
                num_workers=settings.replicas, cpus_per_worker=settings.cpus_per_replica, use_gpu=settings.use_gpu
            )
            gpu = resolve_gpu(scaling).use_gpu is True
            _check_room(scaling.model_copy(update={"use_gpu": gpu}))
            if not own:
                starts = _check_unused(settings)
            ours = True
            _deploy(arguments.model_copy(update={"gpu": gpu}))
            _announce(arguments)
            while not stopped.wait(POLL_SECONDS):
                _check_status()
        finally:
            if ray.is_initialized():
                log.info("stopping")
                try:
                    if ours:  # also before a shutdown, which would end requests that are computed
                        serve.delete(NAME)
                    if own or (ours and starts and not serve.status().applications):  # else the address stays taken
                        serve.shutdown()
                except Exception as error:  # Ray has ended: the error before says so
                    log.warning("cannot end Ray Serve: %s", (str(error).strip() or repr(error)).splitlines()[0])
                finally:
                    ray.shutdown()


def _check_unused(settings: ServingConfig) -> bool:
    """Whether the cluster has no Ray Serve; one that runs must have no application, and the address that is wanted.

    It would replace an application of the same name or address, and ignore other options than its own.
    """
    from ray import serve

    from pipeline.launch.ray_internals import running_serve_options

    used = running_serve_options()
    if used is None:
        return True
    address = _address(used.host, used.port, used.root_path) if used.host else "no address"
    if running := sorted(serve.status().applications):
        raise ServingError(
            f"Ray Serve on the cluster runs {', '.join(running)} already, at {address}: end that first (serve "
            "shutdown), or add this model to its config (--write-config)"
        )
    wanted = http_options(settings)
    if (used.host, used.port, used.root_path) != (wanted["host"], wanted["port"], ""):
        same = (
            f", or use its address: --host {used.host} --port {used.port}" if used.host and not used.root_path else ""
        )
        raise ServingError(
            f"Ray Serve runs on the cluster already, at {address}, which --host and --port cannot change: end it first "
            f"(serve shutdown){same}"
        )
    if used.request_timeout_s is not None and used.request_timeout_s < wanted["request_timeout_s"]:
        log.warning(
            "Ray Serve runs on the cluster already and ends a request after %g s, which --timeout-s cannot change "
            "(serve shutdown ends it)",
            used.request_timeout_s,
        )
    return False


def _deploy(arguments: Arguments) -> None:
    from ray import serve
    from ray.exceptions import RayError

    from pipeline.serving.deployment import build

    try:
        serve.start(proxy_location="EveryNode", http_options=http_options(arguments.settings))
        serve.run(build(arguments.model_dump()), name=NAME, route_prefix="/")
    except (RayError, RuntimeError) as error:  # Ray Serve's own errors have no type
        last = str(error).strip().splitlines()[-1]
        raise ServingError(f"the replicas do not start: {last}") from error


def _check_status() -> None:
    from ray import serve
    from ray.exceptions import RayError

    try:
        status = serve.status().applications.get(NAME)
    except RayError as error:
        raise ServingError(f"Ray has ended: {str(error).strip().splitlines()[0]}") from error
    if status is None or status.status in ("DEPLOY_FAILED", "NOT_STARTED", "DELETING"):
        raise ServingError("the application is gone from Ray Serve; the logs of its replicas say why")


def _announce(arguments: Arguments) -> None:
    address = _address(arguments.settings.host, arguments.settings.port)
    token = f"; clients need the token of {TOKEN}" if arguments.needs_token else ""
    log.info("%s is served at %s/ and /v1/predict%s; Ctrl-C stops", arguments.model, address, token)


def _address(host: str, port: int, path: str = "") -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{path}"


def _check_port(settings: ServingConfig) -> None:
    host = http_options(settings)["host"]
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, settings.port))
    except OSError as error:  # also a machine without IPv6
        raise InputError(
            f"cannot listen on {host}:{settings.port}: {error.strerror}; choose another --port or --host"
        ) from None


def _check_room(scaling: ScalingConfig) -> None:
    import ray

    from pipeline.launch.cluster import count_slots

    slots = count_slots(scaling, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    if slots < scaling.num_workers:
        replica = f"{scaling.cpus_per_worker:g} CPUs" + " and a GPU" * (scaling.use_gpu is True)
        raise ResourceError(
            f"--replicas {scaling.num_workers} of {replica} each, but the cluster holds {slots}; lower it, or "
            "--cpus-per-replica"
        )


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets."""
    stopped = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, previous)
