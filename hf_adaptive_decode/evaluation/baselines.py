"""The baselines an adapter is held against: statics chosen on validation, the oracle, MeanShift; knows no models."""

from __future__ import annotations

from collections.abc import Sequence

from .runner import Decoder, Outcome

STATIC_GRID: tuple[dict[str, float], ...] = tuple(
    {"temperature": temperature, "top_p": top_p}
    for temperature in (0.25, 0.5, 0.75, 1.0, 1.25)
    for top_p in (0.8, 0.9, 1.0)
)


def static_decoders(grid: Sequence[dict[str, float]] = STATIC_GRID) -> list[Decoder]:
    """A decoder for each setting of a grid, named by its parameters."""
    return [Decoder(describe(settings), settings) for settings in grid]


def describe(settings: dict[str, float]) -> str:
    """`T=0.5, top-p 0.9`, and `greedy` for temperature 0."""
    if settings.get("temperature") == 0:
        return "greedy"
    parts = [f"T={settings.get('temperature', 1.0):g}"]
    parts += [f"top-p {settings['top_p']:g}"] if settings.get("top_p", 1.0) < 1 else []
    parts += [f"top-k {settings['top_k']:g}"] if settings.get("top_k") else []
    parts += [f"min-p {settings['min_p']:g}"] if settings.get("min_p") else []
    return ", ".join(parts)


def best(outcomes: Sequence[Outcome], k: int) -> Outcome:
    """The outcome with the highest mean pass@k; of equals the first, so greedy wins ties if it stands first."""
    return max(outcomes, key=lambda outcome: float(outcome.pass_at(k).mean()))


def mean_shift(adapter: Outcome) -> Decoder:
    """
    MeanShift: the adapter's own mean temperature and top-p as a static setting.

    Args:
        adapter ([`Outcome`]): Of the adapter, on validation problems.

    Raises:
        `ValueError`: If the outcome is not an adapter's.
    """
    if adapter.mean_temperature is None or adapter.mean_top_p is None:
        raise ValueError(f"{adapter.decoder.name!r} recorded no temperatures; MeanShift needs an adapter's outcome.")
    settings = {"temperature": adapter.mean_temperature, "top_p": adapter.mean_top_p}
    rounded = {name: round(value, 3) for name, value in settings.items()}
    return Decoder(f"MeanShift ({describe(rounded)})", settings)
