"""Stopping when asked to, between what must happen as a whole."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop; ``signal`` says by what, ``saved`` whether its state is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal, self.saved = number, False


class Interrupts:
    """Turns Ctrl-C and SIGTERM into :class:`Interrupted`."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._inseparable = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Signals raise Interrupted, but for what is :meth:`held_back` only after it; a second Ctrl-C stops at once."""
        process, previous = os.getpid(), {}

        def handle(number: int, frame: Any) -> None:
            if os.getpid() != process:
                return  # a forked worker, which its parent will stop
            if self._signal is None:
                # Remembered too, because Python drops what is raised in a destructor or fork hook.
                self._signal = number
                # Workers that the same signal ends must not raise torch's error amid a step or save. Not SIG_DFL, of
                # which Python complains where one has ended already.
                previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
                if not self._inseparable:
                    raise Interrupted(number)
            elif number == signal.SIGINT:
                raise KeyboardInterrupt  # SIGTERM may come twice from one `timeout`, a second Ctrl-C is meant

        def report(dropped: Any) -> None:
            if not isinstance(dropped.exc_value, Interrupted):
                report_before(dropped)

        report_before, sys.unraisablehook = sys.unraisablehook, report
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[number] = signal.signal(number, handle)
            yield
        finally:
            sys.unraisablehook = report_before
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """For what must happen as a whole, so that the state saved after an interrupt is a consistent one."""
        self._inseparable = True
        try:
            yield
        finally:
            self._inseparable = False
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        if self._signal is not None:
            raise Interrupted(self._signal)
