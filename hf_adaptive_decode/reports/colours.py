"""Colours that the colour-blind tell apart, and the text colour that is read on them; knows numbers, no pages."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

# How many colours a ramp is cut into: enough that neighbours cannot be told apart.
STEPS = 24
# From pale to dark, each darker than the one before it, so that it is read in grey too.
_RAMP = ("#fcfdbf", "#fec98d", "#fd9567", "#f1605d", "#cd4071", "#9e2f7f", "#721f81", "#440f76", "#180f3d")
# Okabe and Ito's palette without black, which is text here.
ACTION_COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#0072b2")


@dataclass(frozen=True)
class Scale:
    """
    An interval that a ramp is stretched over.

    Args:
        low, high (`float`): Its ends, low < high.
    """

    low: float
    high: float

    @staticmethod
    def around(values: Iterable[float], grain: float) -> Scale | None:
        """The shortest interval with multiples of `grain` as ends that holds all of `values`; `None` for no values."""
        known = list(values)
        if not known:
            return None
        # A value a rounding error beyond a multiple is that multiple: fp32's 0.9 is a little above it.
        low = math.floor(round(min(known) / grain, 4))
        high = math.ceil(round(max(known) / grain, 4))
        return Scale(low * grain, max(high, low + 1) * grain)

    def step(self, value: float) -> int:
        """Which of the ramp's colours, from 0 to `STEPS` − 1, stands for a value; those beyond an end take the end."""
        share = (value - self.low) / (self.high - self.low)
        return min(STEPS - 1, max(0, int(share * STEPS)))


def ramp() -> list[str]:
    """The ramp's `STEPS` colours as `#rrggbb`, from pale to dark."""
    return [_between(step / (STEPS - 1) * (len(_RAMP) - 1)) for step in range(STEPS)]


def text_on(background: str) -> str:
    """Black or white, whichever contrasts more with a `#rrggbb` background (at least 4.5 to 1, as WCAG asks)."""
    light = luminance(background)
    return "#000000" if (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) else "#ffffff"


def luminance(colour: str) -> float:
    """WCAG's relative luminance of `#rrggbb`, from 0 (black) to 1 (white)."""
    red, green, blue = (_linear(part / 255) for part in _parts(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _linear(part: float) -> float:
    return part / 12.92 if part <= 0.04045 else float(((part + 0.055) / 1.055) ** 2.4)


def _between(place: float) -> str:
    """The colour at `place`, from 0 (the first of the ramp's anchors) to their number − 1."""
    below = min(int(place), len(_RAMP) - 2)
    pairs = zip(_parts(_RAMP[below]), _parts(_RAMP[below + 1]), strict=True)
    return "#" + "".join(f"{round(low + (high - low) * (place - below)):02x}" for low, high in pairs)


def _parts(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
