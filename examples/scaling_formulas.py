"""The formulas of docs/scaling.md: models, GPUs, decoding and training, in bytes and seconds; knows no tables."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

BF16, FP32 = 2, 4
GB = 1e9


@dataclass(frozen=True)
class Model:
    """A Qwen3 by its public config."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int  # of an expert where there are experts
    experts: int = 1
    active_experts: int = 1
    head_dim: int = 128
    vocab: int = 151_936
    tied: bool = False

    @property
    def expert(self) -> int:
        """Parameters of one expert, or of the one feed-forward layer."""
        return 3 * self.hidden * self.ffn

    @property
    def layer_without_experts(self) -> int:
        """Attention, its two norms, the layer's two norms, and the router."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads) + 2 * self.head_dim
        return attention + 2 * self.hidden + (self.hidden * self.experts if self.experts > 1 else 0)

    @property
    def output(self) -> int:
        """Parameters of the output layer."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All of them."""
        layer = self.layer_without_experts + self.experts * self.expert
        return self.layers * layer + self.hidden + self.output * (1 if self.tied else 2)

    @property
    def active(self) -> int:
        """Parameters that a token is multiplied with: its experts and the output layer, not the input embedding."""
        return self.layers * (self.layer_without_experts + self.active_experts * self.expert) + self.output

    def read(self, rows: float) -> float:
        """Parameters that a step of `rows` tokens reads: of the experts those that are hit, if all are as likely."""
        hit = self.experts * (1 - (1 - self.active_experts / self.experts) ** rows)
        return self.layers * (self.layer_without_experts + hit * self.expert) + self.output

    @property
    def kv_token(self) -> int:
        """Keys and values of one token in bf16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BF16

    def flops_token(self, context: float) -> float:
        """Forward operations of one token that attends to `context` others: 2 a parameter, 4 a query and key."""
        return 2 * self.active + 4 * self.layers * self.heads * self.head_dim * context

    @property
    def heads_parameters(self) -> int:
        """Those of the temperature and top-p heads, 256 wide; the second reads the temperature too."""
        return (self.hidden + 1) * 256 + 257 + (self.hidden + 2) * 256 + 257


@dataclass(frozen=True)
class Gpu:
    """Data sheet figures of one GPU (SXM), dense bf16; links in one direction."""

    name: str
    memory: float
    bandwidth: float
    flops: float = 989e12
    nvlink: float = 450e9
    network: float = 50e9
    node: int = 8


@dataclass(frozen=True)
class Assumed:
    """What is assumed and not derived."""

    price: float = dataclasses.field(default=3.0, metadata={"help": "dollars for a GPU-hour, whichever GPU"})
    forward_part: float = dataclasses.field(default=0.4, metadata={"help": "of peak FLOP/s in long forward passes"})
    bandwidth_part: float = dataclasses.field(default=0.6, metadata={"help": "of HBM bandwidth in decoding"})
    link_part: float = dataclasses.field(default=0.7, metadata={"help": "of a link's rate in collectives"})
    memory_part: float = dataclasses.field(default=0.9, metadata={"help": "of HBM that weights and KV may take"})
    all_reduce: float = dataclasses.field(default=15e-6, metadata={"help": "seconds an all-reduce takes at least"})
    vllm_step: float = dataclasses.field(
        default=2e-3, metadata={"help": "seconds of a vLLM step beside the GPU's work"}
    )
    vllm_start: float = dataclasses.field(
        default=180.0, metadata={"help": "seconds until vLLM decodes its first token"}
    )
    eager_layer: float = dataclasses.field(
        default=250e-6, metadata={"help": "seconds to launch one layer in transformers, about 25 kernels"}
    )
    prompt: int = dataclasses.field(default=512, metadata={"help": "tokens of a prompt"})
    completion: int = dataclasses.field(default=4096, metadata={"help": "tokens of a completion"})
    drawn_per_kept: int = dataclasses.field(default=3, metadata={"help": "completions sampled for one that is kept"})
    decided: float = dataclasses.field(default=0.25, metadata={"help": "part of the tokens that a policy decides"})
    disk: float = dataclasses.field(default=5e9, metadata={"help": "bytes a second from an NVMe disk"})


MODELS = {
    "4B": Model("Qwen3-4B", 36, 2560, 32, 8, 9728, tied=True),
    "30B": Model("Qwen3-30B-A3B", 48, 2048, 32, 4, 768, experts=128, active_experts=8),
    "235B": Model("Qwen3-235B-A22B", 94, 4096, 64, 4, 1536, experts=128, active_experts=8),
}
H100, H200 = Gpu("H100", 80e9, 3.35e12), Gpu("H200", 141e9, 4.8e12)
# AutoDeco's recipe (section 6), and a batch of `train-policy` with the defaults of the embedded model.
ROWS, STEPS, BATCH, LENGTH = 6000, 400, 32, 16_384
PROMPTS, GENERATIONS = 96, 8
# `evaluate`: 15 static settings and the adapter on validation, the adapter and four baselines on test; greedy on both.
VALIDATION, TEST, STATICS, BASELINES = 300, 600, 15, 4
CACHED = 931  # bytes of a position's sketch


@dataclass(frozen=True)
class Replica:
    """A model on the GPUs that decode it together, by tensor parallelism within a node."""

    model: Model
    gpu: Gpu
    gpus: int
    assumed: Assumed

    @property
    def name(self) -> str:
        """The model and its GPUs."""
        return f"{self.model.name}, {self.gpus} {self.gpu.name}"

    @property
    def kv_token(self) -> float:
        """Over all GPUs: where there are more of them than KV heads, each head lies on several."""
        return self.model.kv_token * max(1.0, self.gpus / self.model.kv_heads)

    @property
    def room(self) -> float:
        """Bytes for keys and values."""
        return self.gpus * self.gpu.memory * self.assumed.memory_part - BF16 * self.model.parameters

    def rows(self, tokens: float) -> int:
        """How many rows of that many tokens fit."""
        return max(0, math.floor(self.room / (self.kv_token * tokens)))

    @property
    def mean_context(self) -> float:
        """Tokens that a row has on average while it is written."""
        return self.assumed.prompt + self.assumed.completion / 2

    def step(self, rows: float, context: float, gpus: int | None = None) -> float:
        """Seconds of the GPUs' work for one token of each row: the larger of reading and computing, and all-reduces."""
        gpus, a = self.gpus if gpus is None else gpus, self.assumed
        read = BF16 * self.model.read(rows) + rows * context * self.kv_token
        compute = rows * self.model.flops_token(context)
        work = max(read / (self.gpu.bandwidth * a.bandwidth_part), compute / (self.gpu.flops * a.forward_part)) / gpus
        if gpus == 1:
            return work
        sent = 2 * (gpus - 1) / gpus * rows * self.model.hidden * BF16 / (self.gpu.nvlink * a.link_part)
        return work + 2 * self.model.layers * (a.all_reduce + sent)

    def vllm(self, rows: float) -> float:
        """Tokens a second of vLLM, whose rows hold what they have written and no more."""
        return rows / (self.step(rows, self.mean_context) + self.assumed.vllm_step)

    def transformers(self, rows: float) -> float:
        """Tokens a second of transformers: rows are as long as the longest; of several GPUs one works at a time."""
        longest = self.assumed.prompt + self.assumed.completion
        launches = self.assumed.eager_layer * self.model.layers
        return rows / max(self.step(rows, longest, gpus=1), launches)

    @property
    def most(self) -> int:
        """Rows that fit at the mean context."""
        return self.rows(self.mean_context)

    @property
    def full(self) -> int:
        """Rows that vLLM decodes at once: all that fit, up to 512."""
        return min(512, self.most)

    @property
    def rollout(self) -> float:
        """Seconds of one completion among many: its tokens, and its part of a prompt that its group shares."""
        a = self.assumed
        prefill = a.prompt * self.model.flops_token(a.prompt / 2) / (self.gpus * self.gpu.flops * a.forward_part)
        return a.completion / self.vllm(self.full) + prefill / GENERATIONS

    def gpu_hours(self, completions: float) -> float:
        """Of so many completions."""
        return completions * self.rollout * self.gpus / 3600


def replicas(assumed: Assumed) -> list[Replica]:
    """The smallest that fit, and a roomier one."""
    chosen = [("4B", H100, 1), ("30B", H100, 2), ("30B", H200, 1), ("235B", H100, 8), ("235B", H200, 8)]
    return [Replica(MODELS[name], gpu, gpus, assumed) for name, gpu, gpus in chosen]


def smallest(assumed: Assumed) -> list[Replica]:
    """One of each model: what the costs are reckoned with."""
    found = replicas(assumed)
    return [found[0], found[2], found[4]]


@dataclass(frozen=True)
class Training:
    """Heads on a frozen base, data-parallel over GPUs, one micro-batch of `rows` rows a GPU at once."""

    model: Model
    assumed: Assumed
    gpu: Gpu = H100
    gpus: int = 8
    length: int = LENGTH

    @property
    def forward(self) -> float:
        """Operations of one row: each token attends to half of the row; nothing goes backward through the base."""
        return self.length * self.model.flops_token(self.length / 2)

    def compute(self, rows: float) -> float:
        """Seconds that a GPU computes rows."""
        return rows * self.forward / (self.gpu.flops * self.assumed.forward_part)

    @property
    def step(self) -> float:
        """Seconds of one step."""
        return self.compute(BATCH / self.gpus)

    @property
    def gpu_hours(self) -> float:
        """Of all steps."""
        return STEPS * self.step * self.gpus / 3600

    @property
    def epochs(self) -> float:
        """How often each row is seen."""
        return STEPS * BATCH / ROWS

    @property
    def layer(self) -> float:
        """Bytes of one layer, which ZeRO-3 gathers whole: all experts, however few are used."""
        return BF16 * (self.model.layer_without_experts + self.model.experts * self.model.expert)

    @property
    def activations(self) -> float:
        """One row's, of one layer: hidden states in and out, queries, keys, values, and what its experts compute."""
        wide = 4 * self.model.hidden + self.model.head_dim * (self.model.heads + 2 * self.model.kv_heads)
        return self.length * BF16 * (wide + self.model.active_experts * (2 * self.model.ffn + self.model.hidden))

    @property
    def memory(self) -> float:
        """Of a GPU under ZeRO-3: a shard, this layer and the next, activations, heads with gradients and Adam."""
        shard = BF16 * self.model.parameters / self.gpus
        return shard + 2 * self.layer + self.activations + 4 * FP32 * self.model.heads_parameters

    @property
    def gathered(self) -> float:
        """Bytes that a GPU receives in one forward pass under ZeRO-3, however many rows that has."""
        return BF16 * self.model.parameters * (self.gpus - 1) / self.gpus

    def gather(self, link: float) -> float:
        """Seconds that takes over a link."""
        return self.gathered / (link * self.assumed.link_part)

    @property
    def hiding_rows(self) -> int:
        """Rows of a GPU's pass from which computing takes longer than gathering over the network."""
        return math.ceil(self.gather(self.gpu.network) / self.compute(1))

    @property
    def cached_position(self) -> int:
        """Bytes kept of a position by the epoch cache: a sketch of its logits and its hidden state."""
        return CACHED + BF16 * self.model.hidden

    @property
    def cache(self) -> float:
        """Bytes of all positions."""
        return ROWS * self.length * self.cached_position

    @property
    def cached_read(self) -> float:
        """Seconds to read one step's positions from one disk."""
        return BATCH * self.length * self.cached_position / self.assumed.disk


def decision_bytes(model: Model) -> int:
    """What is recorded of a decision: the hidden state in fp32; action, row and step; both budgets."""
    return FP32 * model.hidden + 3 * 8 + 2 * FP32


def evaluation_completions(samples: int = 8) -> int:
    """With the defaults of `evaluate`."""
    return VALIDATION * ((STATICS + 1) * samples + 1) + TEST * ((1 + BASELINES) * samples + 1)
