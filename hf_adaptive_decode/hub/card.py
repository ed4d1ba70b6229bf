"""The model card of an adapter's folder, written and brought up to date; knows settings and files, no models."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCardData, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..configuration import POLICY_NAMES, AutoDecoConfig, read_config
from ..errors import AdapterConfigError
from .card_text import NO_RESULTS, TrainingFacts, introduction, limits_and_citations, training_section, usage_section
from .markdown import plain
from .result_lines import RESULTS_FILE, read_results
from .results import MARK, model_index, results_section, static_setting
from .static_setting import SPECIAL_TOKENS, STATIC_FILE, write_static_generation_config
from .store import CONFIG_FILE, PEFT_FILES, PEFT_FOLDER, WEIGHTS_FILE
from .writing import replacing

CARD_FILE = "README.md"
_HEADING = "## Results\n\n"
_AGED = (
    "**The weights in this folder are not those that these results were measured with.** Measure again before relying "
    "on them.\n\n"
)
_MEASURED = re.compile(r"^Measured with a `model\.safetensors` of SHA-256 `([0-9a-f]{64})`\.", re.MULTILINE)


def update_card(
    folder: str | os.PathLike[str],
    config: AutoDecoConfig,
    results: Sequence[Mapping[str, Any]] | str | os.PathLike[str] | None = None,
    *,
    training: TrainingFacts | None = None,
    name: str | None = None,
) -> Path:
    """
    Writes an adapter folder's model card, or brings the one that is there up to date; doing it twice changes nothing.

    A section between `<!-- hf_adaptive_decode:NAME -->` and `<!-- /hf_adaptive_decode:NAME -->` (`usage`, `training`,
    `results`) is replaced. All other text of an existing card stays as it is, byte for byte; training facts and results
    go to its end if it has no section for them. Its metadata is written anew only where something changes.

    Args:
        folder (`str` or `os.PathLike`): The adapter's.
        config ([`AutoDecoConfig`]): Its settings.
        results (sequence of mappings, `str` or `os.PathLike`, *optional*): The lines of a `results.jsonl`, or the file.
            When `None` the card keeps its results, marked as outdated if the weights are others now; a card without
            any takes those of a `results.jsonl` in the folder.
        training ([`TrainingFacts`], *optional*): What it was trained on; when `None` the card keeps what it says.
        name (`str`, *optional*): What the code in the card calls the adapter; the folder's name when `None`.

    Returns:
        `Path`: The card.

    Raises:
        [`AdapterConfigError`]: If the existing card's metadata cannot be read, or a section's markers do not pair up.
        [`AdapterLoadError`]: If the results cannot be read.
    """
    path, name = Path(folder, CARD_FILE), name or Path(folder).resolve().name or "adapter"
    has_lora = Path(folder, PEFT_FOLDER, PEFT_FILES[0]).exists()
    card = _Card.read(path) if path.exists() else _Card.fresh(path, config, name, has_lora)
    if card.section("usage") is not None:
        card.put("usage", usage_section(config, name, has_lora))
    if training is not None:
        card.put("training", training_section(config, training))
    weights = _digest(Path(folder, WEIGHTS_FILE))
    index = card.metadata.get("model-index")
    shown = card.section("results")
    if results is None and shown in (None, NO_RESULTS) and Path(folder, RESULTS_FILE).exists():
        # It lies beside the weights, but nobody said that it was measured with these.
        results, weights = Path(folder, RESULTS_FILE), None
    if results is not None:
        lines = read_results(results)
        card.put("results", results_section(lines, weights))
        index = _merged(index, plain(name), model_index(lines))
        _write_static(folder, static_setting(lines))
    elif shown is not None:
        text = _aged(shown, weights)
        card.put("results", text)
        index = _merged(index, plain(name), []) if _AGED in text else index
    card.save(_metadata(card.metadata, config, index, has_lora))
    return path


def add_results(folder: str | os.PathLike[str], results: Sequence[Mapping[str, Any]] | str | os.PathLike[str]) -> Path:
    """
    Puts measured results into an adapter's card, and beside it as `results.jsonl`.

    Where a static setting does as well, that setting goes into `static/generation_config.json` too.

    Args:
        folder (`str` or `os.PathLike`): The adapter's, with the weights that were measured.
        results (sequence of mappings, `str` or `os.PathLike`): The lines of an evaluation, or the file it wrote.

    Returns:
        `Path`: The card.

    Raises:
        [`AdapterLoadError`], [`AdapterConfigError`]: As [`update_card`]; nothing is written then.
    """
    config = read_config(Path(folder, CONFIG_FILE))
    card = update_card(folder, config, results)
    own = Path(folder, RESULTS_FILE)
    if isinstance(results, str | os.PathLike) and own.exists() and own.samefile(results):
        return card
    with replacing(own) as staged:
        if isinstance(results, str | os.PathLike):
            shutil.copyfile(results, staged)
        else:
            staged.write_text("".join(json.dumps(line) + "\n" for line in results), encoding="utf-8")
    return card


def add_training(folder: str | os.PathLike[str], facts: TrainingFacts) -> Path:
    """Puts what an adapter was trained on into its card; raises as [`update_card`]."""
    return update_card(folder, read_config(Path(folder, CONFIG_FILE)), training=facts)


def publish_card(
    folder: str | os.PathLike[str],
    config: AutoDecoConfig,
    repo_id: str,
    source: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
) -> None:
    """
    Makes the card in a folder that is about to be uploaded the successor of the one that is there.

    Args:
        folder (`str` or `os.PathLike`): What will be uploaded.
        config ([`AutoDecoConfig`]): The adapter's settings.
        repo_id (`str`): Where to, with the owner's name.
        source (`str` or `os.PathLike`, *optional*): Folder whose card, results and static setting go along; when
            `None`, the repository's own card is brought up to date.
        token, revision: As `huggingface_hub` takes them.
    """
    if source is not None:
        for name in (CARD_FILE, RESULTS_FILE, STATIC_FILE):
            if Path(source, name).exists():
                Path(folder, name).parent.mkdir(exist_ok=True)
                shutil.copyfile(Path(source, name), Path(folder, name))
    elif HfApi(token=token).file_exists(repo_id, CARD_FILE, revision=revision):
        shutil.copyfile(hf_hub_download(repo_id, CARD_FILE, revision=revision, token=token), Path(folder, CARD_FILE))
    try:
        update_card(folder, config, name=repo_id)
    except AdapterConfigError as error:
        raise AdapterConfigError(f"the card of {source or repo_id} cannot be brought up to date: {error}") from error


@dataclass
class _Card:
    """A card's metadata and text. `before` is the file as it was, of which `head` is the metadata's block."""

    path: Path
    metadata: dict[str, Any]
    head: str
    body: str
    before: str | None = None

    @classmethod
    def fresh(cls, path: Path, config: AutoDecoConfig, name: str, has_lora: bool) -> _Card:
        sections = {
            "usage": usage_section(config, name, has_lora),
            "training": training_section(config, TrainingFacts()),
            "results": NO_RESULTS,
        }
        parts = [
            introduction(config),
            *(_marked(key, text) for key, text in sections.items()),
            limits_and_citations(config),
        ]
        return cls(path, {}, "", "\n" + "\n\n".join(parts))

    @classmethod
    def read(cls, path: Path) -> _Card:
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                content = file.read()
            block = REGEX_YAML_BLOCK.search(content)
            metadata = (yaml.safe_load(block.group(2)) or {}) if block else {}
            if not isinstance(metadata, dict):
                raise ValueError(f"it is a {type(metadata).__name__} and has to hold `name: value` lines")
            ModelCardData(**metadata)
        except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
            raise AdapterConfigError(
                f"the metadata of {path} cannot be read; mend or remove the file: {error}"
            ) from error
        end = block.end() if block else 0
        return cls(path, metadata, content[:end], content[end:], content)

    @property
    def line_break(self) -> str:
        return "\r\n" if "\r\n" in (self.before or "") else "\n"

    def section(self, name: str) -> str | None:
        """What stands between the markers of `name`; `None` without them."""
        found = self._find(name)
        return None if found is None else found.group(1).replace("\r\n", "\n").strip("\n")

    def put(self, name: str, text: str) -> None:
        """Replaces what stands between the markers of `name`, or puts both at the end."""
        block = _marked(name, text).replace("\n", self.line_break)
        found = self._find(name)
        if found is not None:
            self.body = self.body[: found.start()] + block + self.body[found.end() :]
            return
        gap = self.line_break * 2 if self.body and not self.body.endswith(("\n", "\r")) else self.line_break
        self.body += f"{gap}{block}{self.line_break}"

    def _find(self, name: str) -> re.Match[str] | None:
        # A marker counts only alone on its line, so that one within a sentence or a name does nothing.
        opening, closing = (rf"(?<![^\r\n])<!-- {slash}hf_adaptive_decode:{name} -->" for slash in ("", "/"))
        end = r"(?=[ \t]*(?:[\r\n]|\Z))"
        found = re.search(f"{opening}{end}(.*?){closing}{end}", self.body, re.DOTALL)
        counts = [len(re.findall(marker + end, self.body)) for marker in (opening, closing)]
        if counts != ([0, 0] if found is None else [1, 1]):
            raise AdapterConfigError(
                f"{self.path} has {counts[0]} lines <!-- hf_adaptive_decode:{name} --> and {counts[1]} lines "
                f"<!-- /hf_adaptive_decode:{name} -->; it has to have one of each, in this order, or none."
            )
        return found

    def save(self, metadata: dict[str, Any]) -> None:
        """Writes the card, whole or not at all, if anything has changed."""
        if metadata != self.metadata:
            data = ModelCardData(**{key: value for key, value in metadata.items() if key != "model-index"})
            # As it is, since parsed a user's own entries would lose what `EvalResult` has no field for.
            data["model-index"] = metadata.get("model-index")
            text = data.to_yaml(line_break=self.line_break, original_order=list(metadata))
            self.head = f"---{self.line_break}{text}{self.line_break}---{self.line_break}"
        if self.head + self.body == self.before:
            return
        with replacing(self.path) as staged:
            staged.write_text(self.head + self.body, encoding="utf-8", newline="")


def _marked(name: str, text: str) -> str:
    return f"<!-- hf_adaptive_decode:{name} -->\n\n{text}\n\n<!-- /hf_adaptive_decode:{name} -->"


def _aged(section: str, weights: str | None) -> str:
    """A results section, with a warning if it says that other weights were measured."""
    text = section.replace(_AGED, "")
    measured = _MEASURED.search(text)
    return text.replace(_HEADING, _HEADING + _AGED, 1) if measured and measured[1] != weights else text


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _write_static(folder: str | os.PathLike[str], static: Mapping[str, float] | None) -> None:
    if static is not None:
        own = Path(folder, "generation_config.json")
        tokens = json.loads(own.read_text(encoding="utf-8")) if own.exists() else {}
        write_static_generation_config(folder, static, {name: tokens.get(name) for name in SPECIAL_TOKENS})


def _metadata(
    before: Mapping[str, Any], config: AutoDecoConfig, index: list[dict[str, Any]] | None, has_lora: bool
) -> dict[str, Any]:
    tags = ["adaptive-decoding", f"adaptive-decoding-{config.policy}", *(["peft"] if has_lora else [])]
    others = {"peft", *(f"adaptive-decoding-{policy}" for policy in POLICY_NAMES)} - set(tags)
    kept = [tag for tag in ModelCardData(tags=before.get("tags")).tags or [] if tag not in others]
    ours: dict[str, Any] = {"library_name": "hf_adaptive_decode", "pipeline_tag": "text-generation"}
    ours["tags"] = [*kept, *(tag for tag in tags if tag not in kept)]
    if _is_on_the_hub(config.base_model_name_or_path):
        ours |= {"base_model": config.base_model_name_or_path, "base_model_relation": "adapter"}
    after = {**before, **ours, "model-index": index}
    return {key: value for key, value in after.items() if key != "model-index" or value}


def _is_on_the_hub(name: str | None) -> bool:
    """Whether a base model's name is a Hub id, and no path that happens to look like one."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return False
    return "/" in (name or "") and not os.path.exists(name or "")


def _merged(index: list[dict[str, Any]] | None, name: str, ours: list[EvalResult]) -> list[dict[str, Any]]:
    """A `model-index` with `ours` in place of what this library wrote into it before."""
    entries = []
    for entry in index or []:
        results = [
            {**result, "metrics": [metric for metric in result["metrics"] if not _is_ours(metric)]}
            for result in entry["results"]
        ]
        entries.append({**entry, "results": [result for result in results if result["metrics"]]})
    if ours:
        new = eval_results_to_model_index(name, ours)
        entries = entries or [{**new[0], "results": []}]
        entries[0]["results"] += new[0]["results"]
    return [entry for entry in entries if entry["results"]]


def _is_ours(metric: Mapping[str, Any]) -> bool:
    arguments = metric.get("args")
    return isinstance(arguments, Mapping) and MARK.items() <= arguments.items()
