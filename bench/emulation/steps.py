"""Progress as lines: a new one for each step, and on a terminal the step's last line counts on."""

from __future__ import annotations

import time
from typing import TextIO

from .debian import Progress

EVERY_S = 2.0


def step_lines(stream: TextIO) -> Progress:
    """Progress that writes a line when a step begins, and the state of a long step every two
    seconds.
    """
    state: dict[str, object] = {"step": None, "told": 0.0}

    def tell(share: float, text: str) -> None:
        step, now = text.split(":")[0], time.monotonic()
        if step == state["step"] and now - float(str(state["told"])) < EVERY_S:
            return
        state.update(step=step, told=now)
        stream.write(f"{100 * share:3.0f} %  {text}\n")
        stream.flush()

    return tell
