"""The static settings that a baseline is chosen from, and what tables call a setting; knows no models."""

from __future__ import annotations

from collections.abc import Mapping

STATIC_GRID: tuple[dict[str, float], ...] = tuple(
    {"temperature": temperature, "top_p": top_p}
    for temperature in (0.25, 0.5, 0.75, 1.0, 1.25)
    for top_p in (0.8, 0.9, 1.0)
)


def describe(settings: Mapping[str, float]) -> str:
    """`T=0.5, top-p 0.9`, and `greedy` for temperature 0."""
    if settings.get("temperature") == 0:
        return "greedy"
    parts = [f"T={settings.get('temperature', 1.0):g}"]
    parts += [f"top-p {settings['top_p']:g}"] if settings.get("top_p", 1.0) < 1 else []
    parts += [f"top-k {settings['top_k']:g}"] if settings.get("top_k") else []
    parts += [f"min-p {settings['min_p']:g}"] if settings.get("min_p") else []
    return ", ".join(parts)
