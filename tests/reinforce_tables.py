"""A language model that is a table, so that every probability is known, and REINFORCE trainers on it."""

from __future__ import annotations

import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from hf_adaptive_decode import (
    AutoDecoConfig,
    AutoDecoForCausalLM,
    DecodeState,
    REINFORCEDecodingTrainer,
    REINFORCEDecodingTrainingArguments,
)

PAD, EOS = 0, 1
ANSWERS = list("abcde")
WORDS = ["<pad>", "<eos>", "<unk>", "steady", "varied", *ANSWERS, "think", "[user]", "[system]", "[assistant]"]
ID = {word: index for index, word in enumerate(WORDS)}
GREEDY, VARIED = {"temperature": 0.0}, {"temperature": 1.25}
# After either word "a" is the likeliest answer, though most answers are another: "steady" wants the one, "varied" one
# of the others. So greedy decoding is always right after "steady", and after "varied" never.
SPREAD = {"a": 0.4, "b": 0.15, "c": 0.15, "d": 0.15, "e": 0.15}
CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}{{ last }}"


class TableConfig(PreTrainedConfig):
    model_type = "reinforce_table"

    def __init__(self, vocab_size: int = 0, **kwargs):
        self.vocab_size = vocab_size
        super().__init__(eos_token_id=EOS, pad_token_id=PAD, **kwargs)


class TableLM(PreTrainedModel, GenerationMixin):
    """The next token's probabilities are the row of the last token; the hidden state is its one-hot vector."""

    config_class = TableConfig

    def __init__(self, config: TableConfig):
        super().__init__(config)
        size = config.vocab_size
        self.embedding = torch.nn.Embedding(size, size)
        self.head = torch.nn.Linear(size, size, bias=False)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return CausalLMOutput(logits=self.head(self.embedding(input_ids)))


@torch.no_grad()
def table_model(probabilities: torch.Tensor) -> TableLM:
    """From a table `[V, V]` whose row v holds the probabilities of what follows v."""
    model = TableLM(TableConfig(len(probabilities)))
    model.embedding.weight.copy_(torch.eye(len(probabilities)))
    model.head.weight.copy_(probabilities.clamp(min=1e-30).log().T)
    return model.eval()


def build_table(spread=SPREAD, **rows) -> TableLM:
    """After a kind of prompt comes an answer, and after everything else the end."""
    table = torch.zeros(len(WORDS), len(WORDS))
    table[:, EOS] = 1.0
    for kind, following in {"steady": spread, "varied": spread, **rows}.items():
        table[ID[kind]] = 0.0
        for word, probability in following.items():
            table[ID[kind], ID[word]] = probability
    return table_model(table)


def build_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = chat_template
    return tokenizer


def build_rows(count: int = 16, kinds=("steady", "varied")):
    return [{"prompt": kinds[index % len(kinds)], "wants_a": index % len(kinds) == 0} for index in range(count)]


def right(prompts, completions, **columns):
    return [float((text == "a") == (prompt == "steady")) for prompt, text in zip(prompts, completions, strict=True)]


def says(word):
    """A reward for one answer."""

    def reward(completions, **columns):
        return [float(text == word) for text in completions]

    return reward


def config(policy="token_actions", actions=(GREEDY, VARIED), **settings) -> AutoDecoConfig:
    return AutoDecoConfig(policy=policy, actions=[*actions], max_token_budget=8, max_parallel_budget=8, **settings)


def arguments(folder, **settings) -> REINFORCEDecodingTrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "num_generations": 4,
        "budget": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return REINFORCEDecodingTrainingArguments(**{**defaults, **settings})


def build_trainer(
    folder, reward=right, rows=None, model=None, settings=None, tokenizer=None, evaluation=None, helpers=None, **options
) -> REINFORCEDecodingTrainer:
    """A trainer from weights that are the same for the same arguments; `options` are the trainer's arguments."""
    torch.manual_seed(0)
    model = build_table() if model is None else model
    if not isinstance(model, AutoDecoForCausalLM):
        model = AutoDecoForCausalLM.from_base(model, config() if settings is None else settings)
    return REINFORCEDecodingTrainer(
        model,
        reward,
        arguments(folder, **options),
        build_rows() if rows is None else rows,
        evaluation,
        tokenizer or build_tokenizer(),
        **(helpers or {}),
    )


def train(folder, *args, resume=None, **options) -> REINFORCEDecodingTrainer:
    trainer = build_trainer(folder, *args, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def adapter_of(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.decoding_adapter.state_dict().items()}


@torch.no_grad()
def choice(trainer, prompt: str, budget: int = 2, samples: int = 1) -> torch.Tensor:
    """The policy's probability of each action after a prompt, `[actions]`."""
    ids = torch.tensor([trainer.processing_class(prompt)["input_ids"]])
    hidden, logits = tiny.hidden_and_logits(trainer.model, ids)
    policy = trainer.model.decoding_adapter.eval()
    told = {"remaining_tokens": torch.tensor([budget]), "parallel_samples": torch.tensor([samples])}
    return policy.action_logits(policy.observe(DecodeState(hidden[:, -1], logits[:, -1], **told))).softmax(-1)[0]


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
