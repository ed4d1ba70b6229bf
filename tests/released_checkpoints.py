"""Checkpoints in AutoDeco's released format, written out by hand, and their predictions in double precision."""

import json

import torch
from safetensors.torch import load_file, save_file
from tiny import hidden_and_logits, prompts

BOTH = ("temperature", "top_p")


def make_heads(base, enhanced=True, heads=BOTH, widths=(12, 20), dtype=torch.float32, seed=0):
    """Tensors by their released names; T and P spread widely, and P depends visibly on each of its inputs."""
    generator = torch.Generator().manual_seed(seed)
    hidden, _ = hidden_and_logits(base, prompts(4, 12))
    hidden = hidden.flatten(0, 1).float()
    width, vocabulary = hidden.shape[-1], base.get_output_embeddings().weight.shape[0]
    inputs = {"temperature": torch.ones(width), "top_p": torch.ones(width + (5 if enhanced else 1))}
    inputs["top_p"][width] = hidden.std() * 2
    if enhanced:
        # The variance of probabilities is of the order of 1 / V.
        inputs["top_p"][width + 1 :] = hidden.std() * torch.tensor([3.0, 1.0, 0.5 * vocabulary, 3.0])
    tensors = {}
    for head, name, hidden_width in (("temperature", "temp_head", widths[0]), ("top_p", "top_p_head", widths[1])):
        scale = inputs[head] / (hidden.std() * len(inputs[head]) ** 0.5)
        up = torch.randn(hidden_width, len(scale), generator=generator) * scale
        out = torch.randn(1, hidden_width, generator=generator) * (2.5 / hidden_width**0.5)
        biases = torch.randn(hidden_width, generator=generator) * 0.1, torch.randn(1, generator=generator) * 0.2
        if head in heads:
            tensors |= {f"{name}.mlp.0.weight": up, f"{name}.mlp.0.bias": biases[0]}
            tensors |= {f"{name}.mlp.2.weight": out, f"{name}.mlp.2.bias": biases[1]}
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def settings_of(base, enhanced=True, heads=BOTH, base_name=None, **more):
    own = base.config.to_dict()
    width = base.get_output_embeddings().weight.shape[1]
    return {
        **own,
        "model_type": "autodeco",
        "architectures": ["AutoDecoModelForCausalLM"],
        "base_model_type": own["model_type"],
        "base_model_name_or_path": base_name,
        "enable_temperature_head": "temperature" in heads,
        "enable_top_p_head": "top_p" in heads,
        "use_enhanced_features": enhanced,
        "top_p_hidden_size": width,
        "temperature_hidden_size": width,
        **more,
    }


def write_config(folder, settings):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))


def write_released(folder, base, file="model.safetensors", tensors=None, **how):
    """A folder with heads alone; returns their tensors."""
    shape = {name: how.pop(name) for name in ("widths", "dtype", "seed") if name in how}
    chosen = {name: how[name] for name in ("enhanced", "heads") if name in how}
    tensors = make_heads(base, **shape, **chosen) if tensors is None else tensors
    write_config(folder, settings_of(base, **how))
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return tensors


def write_merged(folder, base, base_folder, shards=1, **how):
    """A folder with heads and base; the base's files are named as transformers writes them."""
    base.save_pretrained(base_folder)
    heads = write_released(folder, base, **how)
    tensors = {f"llm.{name}": tensor for name, tensor in load_file(base_folder / "model.safetensors").items()} | heads
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return heads
    (folder / "model.safetensors").unlink()
    # The heads in the last file, and nothing else there.
    names = [name for name in tensors if name not in heads]
    size = -(-len(names) // (shards - 1))
    parts = [names[start : start + size] for start in range(0, len(names), size)] + [list(heads)]
    files = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return heads


def statistics_by_hand(logits, temperature):
    """Max p, entropy, variance and top-5 mass `[N, 4]` of softmax(l / (T + 1e-8)), in the precision of `logits`."""
    p = torch.softmax(logits / (temperature[:, None] + 1e-8), dim=-1)
    entropy = -(p * torch.log(p + 1e-8)).sum(-1)
    mean = p.mean(-1, keepdim=True)
    variance = ((p - mean) ** 2).sum(-1) / (p.shape[-1] - 1)
    top = p.sort(-1, descending=True).values[:, :5]
    return torch.stack([top[:, 0], entropy, variance, top.sum(-1)], dim=-1)


def predict_by_hand(tensors, hidden, logits, enhanced=True, detach=True):
    """T and P `[N]` in double precision, `None` for a head that is not there; with the graph of `tensors`."""
    hidden, logits = hidden.double(), logits.double()

    def mlp(head, x):
        w = {name.removeprefix(f"{head}.mlp."): t.double() for name, t in tensors.items() if name.startswith(head)}
        inner = (x @ w["0.weight"].T + w["0.bias"]).clamp(min=0)
        return torch.sigmoid(inner @ w["2.weight"].T + w["2.bias"])[:, 0]

    temperature = 2 * mlp("temp_head", hidden) if "temp_head.mlp.0.weight" in tensors else None
    top_p = None
    if "top_p_head.mlp.0.weight" in tensors:
        seen = torch.ones(len(hidden), dtype=torch.double) if temperature is None else temperature
        seen = seen.detach() if detach else seen
        parts = [hidden, seen[:, None], *([statistics_by_hand(logits, seen)] if enhanced else [])]
        top_p = mlp("top_p_head", torch.cat(parts, dim=-1))
    return temperature, top_p
