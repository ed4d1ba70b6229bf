"""The static settings that baselines are chosen from; knows no models."""

from __future__ import annotations

STATIC_GRID: tuple[dict[str, float], ...] = tuple(
    {"temperature": temperature, "top_p": top_p}
    for temperature in (0.25, 0.5, 0.75, 1.0, 1.25)
    for top_p in (0.8, 0.9, 1.0)
)
