"""What a command in the prompt did to temperature and top-p, for `evaluate`; knows numbers and no model."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hf_adaptive_decode.evaluation.control import control_effect
from hf_adaptive_decode.evaluation.modules import RefusesEmpty

_DESCRIPTION = """
Whether a model that sets its own sampling parameters obeys a command in the prompt, such as "be as certain as
possible": mean temperature and top-p without and with the command, their differences with 95 % bootstrap intervals over
prompts, and consistency, the share of prompts whose mean moved in the commanded direction (Table 4 of the paper).
"""

_CITATION = """
@article{wang2025end,
  title = {The End of Manual Decoding: Towards Truly End-to-End Language Models},
  author = {Wang, Zhichao and Ma, Dongyang and Huang, Xinting and Cai, Deng and Lan, Tian and Xu, Jiahao and
            Mi, Haitao and Tang, Xiaoying and Wang, Yan},
  journal = {arXiv:2510.26697},
  year = {2025}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of `dict`): For each prompt with the command, what it was sampled with: `temperature` and `top_p`,
        each one number a token, or the mean over them. NaN marks tokens that were not recorded.
    references (list of `dict`): The same prompts without the command, in the same order.
    direction (`str`): What the command asks for, `"low"` or `"high"` diversity.
    seed (`int`, defaults to 0): Seeds the bootstrap.

Returns:
    For each parameter, `temperature` and `top_p` (all `float`):
    `temperature_baseline`, `temperature_command`: Means over prompts without and with the command.
    `temperature_difference`, `temperature_difference_low`, `temperature_difference_high`: Their difference, paired by
        prompt, and its interval.
    `temperature_consistency`: Share of prompts that moved in the commanded direction; one that stayed did not.
    Besides `prompts` (`int`).

Raises:
    `ValueError`: If there are no prompts, or one has no recorded number.

Examples:
    >>> import evaluate
    >>> from hf_adaptive_decode.evaluation.modules import module_path
    >>> metric = evaluate.load(module_path("decoding_control"))
    >>> without = [{"temperature": 0.75, "top_p": 0.8}, {"temperature": 0.5, "top_p": 0.8}]
    >>> commanded = [{"temperature": 0.5, "top_p": 0.7}, {"temperature": 0.5, "top_p": 0.7}]
    >>> result = metric.compute(predictions=commanded, references=without, direction="low")
    >>> result["temperature_difference"], result["temperature_consistency"], result["top_p_consistency"]
    (-0.125, 0.5, 1.0)
"""

_PARAMETERS = ("temperature", "top_p")


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class DecodingControl(RefusesEmpty, evaluate.Metric):
    """What a command did to temperature and top-p."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[
                datasets.Features({side: dict.fromkeys(_PARAMETERS, kind) for side in ("predictions", "references")})
                for kind in (datasets.Sequence(number), number)
            ],
            reference_urls=["https://huggingface.co/papers/2510.26697"],
        )

    def _compute(
        self, predictions: list[dict[str, Any]], references: list[dict[str, Any]], direction: str, seed: int = 0
    ) -> dict[str, Any]:
        results: dict[str, Any] = {}
        for name in _PARAMETERS:
            baseline, command = ([row[name] for row in rows] for rows in (references, predictions))
            effect = control_effect(baseline, command, direction, seed=seed)
            results |= {
                f"{name}_baseline": effect.mean_baseline,
                f"{name}_command": effect.mean_command,
                f"{name}_difference": effect.difference,
                f"{name}_difference_low": effect.interval.low,
                f"{name}_difference_high": effect.interval.high,
                f"{name}_consistency": effect.consistency,
            }
        return {**results, "prompts": len(predictions)}
