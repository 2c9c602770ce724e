"""SIGTERM in a process that runs Ray."""

import signal
import threading


def handle_sigterm_in_python() -> None:
    """Take SIGTERM from Ray's C++ code, and keep the Python handler; to be called after each `ray.init`.

    Ray's C++ handler prints a stack, calls the Python handler, and aborts the process three seconds later, whatever it
    does then. To close a sweep or a run may take longer. Without effect outside the main thread.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
