"""SIGINT and SIGTERM as a wish: what is under way is finished first."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Signals:
    """While active, SIGINT and SIGTERM are noted instead of obeyed; a second SIGINT is obeyed."""

    number: int | None = None

    def __enter__(self) -> Signals:
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
