"""An adapter beside every baseline on one task: chosen on validation, reported on test; knows no particular task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from .baselines import STATIC_GRID, best, mean_shift, static_decoders
from .runner import DEFAULT, GREEDY, Decoder, Outcome, Reward, run_decoder

ADAPTER = Decoder("learned heads")


@dataclass(frozen=True)
class Comparison:
    """
    Outcomes on the test problems.

    Args:
        adapter ([`Outcome`]): The adapter's.
        baselines (list of [`Outcome`]): Those of the baselines, named by how they were chosen.
        ks (tuple of `int`): For which k the statics were chosen.
    """

    adapter: Outcome
    baselines: list[Outcome]
    ks: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything a table shows, ready for JSON."""
        rows = []
        for outcome in (self.adapter, *self.baselines):
            row: dict[str, Any] = {"decoder": outcome.decoder.name, "settings": outcome.decoder.settings}
            for k in self.ks:
                row[f"pass@{k}"] = vars(outcome.interval(k))
                if outcome is not self.adapter:
                    row[f"adapter_gain_pass@{k}"] = vars(self.adapter.difference(outcome, k))
            row["mean_tokens"] = float(outcome.tokens.mean())
            row["truncated"] = float(1 - outcome.ended.mean())
            rows.append(row)
        problems, samples = self.adapter.correct.shape
        return {
            "problems": problems,
            "samples": samples,
            "interval": "95% bootstrap over problems, differences paired by problem",
            "adapter_mean": {"temperature": self.adapter.mean_temperature, "top_p": self.adapter.mean_top_p},
            "rows": rows,
        }


def compare_with_baselines(
    model: PreTrainedModel,
    tokenizer: Any,
    validation: Sequence[Mapping[str, Any]],
    test: Sequence[Mapping[str, Any]],
    reward: Reward,
    *,
    ks: tuple[int, ...] = (1, 8),
    grid: Sequence[dict[str, float]] = STATIC_GRID,
    with_oracle: bool = True,
    seed: int = 0,
    **how: Any,
) -> Comparison:
    """
    The adapter against greedy, default sampling, the best static chosen on validation (for each k), the oracle static
    (chosen on test, so no fair baseline) and MeanShift.

    Args:
        model ([`AutoDecoForCausalLM`]): The adaptive model.
        tokenizer: Its tokenizer.
        validation, test (sequences of mappings): Problems; statics and MeanShift are chosen on the first.
        reward (`Callable`): In TRL's signature.
        ks (tuple of `int`): For which k to report pass@k.
        grid (sequence of `dict`): Static settings to choose from, greedy aside.
        with_oracle (`bool`): Whether to run the whole grid on test as well.
        seed, how: As [`run_decoder`] takes them; `samples` has to be at least the largest k.
    """

    def run(decoder: Decoder, problems: Sequence[Mapping[str, Any]], shift: int) -> Outcome:
        return run_decoder(model, tokenizer, problems, reward, decoder, seed=seed + shift, **how)

    statics = [GREEDY, *static_decoders(grid)]
    on_validation = [run(_labelled(static, "validation"), validation, 1) for static in statics]
    shifted = mean_shift(run(_labelled(ADAPTER, "validation"), validation, 1))
    seen: dict[str, Outcome] = {}

    def on_test(decoder: Decoder, name: str) -> Outcome:
        key = str(decoder.settings)
        if key not in seen:
            seen[key] = run(replace(decoder, name=f"test: {name}"), test, 2)
        return replace(seen[key], decoder=replace(decoder, name=name))

    adapter = on_test(ADAPTER, ADAPTER.name)
    baselines = [on_test(GREEDY, GREEDY.name), on_test(DEFAULT, DEFAULT.name), on_test(shifted, shifted.name)]
    for k in ks:
        chosen = statics[on_validation.index(best(on_validation, k))]
        baselines.append(on_test(chosen, f"best static for pass@{k}, chosen on validation ({chosen.name})"))
    if with_oracle:
        everything = [on_test(static, static.name) for static in statics]
        for k in ks:
            top = best(everything, k)
            baselines.append(on_test(top.decoder, f"oracle static for pass@{k}, chosen on test ({top.decoder.name})"))
    return Comparison(adapter, baselines, ks)


def _labelled(decoder: Decoder, label: str) -> Decoder:
    return replace(decoder, name=f"{label}: {decoder.name}")
