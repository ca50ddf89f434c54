"""TRL's GRPOTrainer with rollouts from the environments of this package (extra ``trl``).

Everything of TRL's trainer is kept: arguments, optimizer, callbacks, trackers, checkpoints, ``accelerate``. Two methods differ:
where completions come from, and how their log-probabilities are computed. One rollout is one completion: the action tokens of
its chunks one after the other. Advantages are those of ``losses.group_advantages``, so that flagged and INVALID rollouts are
left out and groups without a difference are replaced; ``args.scale_rewards`` holds, reward functions do not.

The loss is TRL's ``_compute_loss``, of ``args.loss_type``. With "grpo" and "dapo", loss and gradients are those of
``train_grpo`` on the same rollouts, as long as an update sees all of them (``steps_per_generation=1``).

Shape letters: N rollouts, T chunks in the longest of them, L tokens of a chunk, H W image.
"""

from __future__ import annotations

from typing import Any

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rawdream_env.errors import InvalidOptionError, MissingDependencyError
from rawdream_env.seeding import mix
from rawdream_env.trainers.grpo.batch import Batch, Rollouts
from rawdream_env.trainers.grpo.losses import Baseline, token_weights
from rawdream_env.trainers.grpo.rollout import GroupCollector

try:
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
except ImportError as error:
    raise MissingDependencyError("this trainer needs TRL: pip install 'rawdream-env[trl]'.") from error


class PolicyConfig(PreTrainedConfig):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """Configuration of :class:`PolicyModel`, which has no options."""

    model_type = "rawdream_policy"


class PolicyModel(PreTrainedModel):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """A policy as transformers' trainers want their models; ``policy`` is the policy itself."""

    config_class = PolicyConfig

    def __init__(self, policy: nn.Module) -> None:
        super().__init__(PolicyConfig())
        self.policy = policy
        self.generation_config = GenerationConfig()  # type: ignore[no-untyped-call, unused-ignore]

    def forward(
        self, images: Tensor, instructions: list[str], tokens: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (M, L) of M chunks."""
        policy: Any = self.policy
        result: tuple[Tensor, Tensor] = policy.logprobs_and_entropy(
            images, instructions, tokens, temperature=temperature
        )
        return result

    def activation_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """The policy's own, where it has one; TRL turns it on by default."""
        if callable(enable := getattr(self.policy, "enable_gradient_checkpointing", None)):
            enable()

    gradient_checkpointing_enable = activation_checkpointing_enable

    def train(self, mode: bool = True) -> PolicyModel:
        """As usual; the policy stays in evaluation mode, so that it scores tokens as it sampled them."""
        super().train(mode)
        self.policy.eval()
        return self


_trl: Any = trl  # which finds its names lazily
_GRPOTrainer: Any = _trl.GRPOTrainer


class EnvGRPOTrainer(_GRPOTrainer):  # type: ignore[misc]
    """GRPO of ``policy`` in ``env`` by TRL.

    Args:
        policy: a ``torch.nn.Module`` with ``act`` and ``logprobs_and_entropy``.
        env: a vector environment of this package in DISABLED autoreset mode, or wrappers around one.
        args: TRL's ``GRPOConfig``. ``per_device_train_batch_size`` x ``steps_per_generation`` rollouts per generation are a
            multiple of ``num_generations``. Set ``bf16=False`` for a policy that samples in float32.
        max_groups: maximum number of groups rolled out per generation, dropped ones included.
        max_flagged, baseline: see ``losses.group_advantages``.
        options: further arguments of TRL's trainer, such as ``callbacks`` and ``optimizers``.

    Raises:
        InvalidOptionError: ``args`` asks for what this trainer does not do.
    """

    def __init__(
        self,
        policy: nn.Module,
        env: VectorEnv[Any, Any, Any],
        args: Any,
        *,
        max_groups: int = 64,
        max_flagged: int = 2,
        baseline: Baseline = "mean",
        **options: Any,
    ) -> None:
        if args.scale_rewards not in ("group", "none") or args.loss_type not in ("grpo", "dapo") or args.beta != 0:
            raise InvalidOptionError(
                f"scale_rewards={args.scale_rewards!r} must be 'group' or 'none', loss_type={args.loss_type!r} 'grpo' or "
                f"'dapo' and beta={args.beta} 0."
            )
        args.remove_unused_columns = False
        rows = args.per_device_train_batch_size * args.steps_per_generation
        if rows % args.num_generations:
            raise InvalidOptionError(
                f"{rows} rollouts per generation are no multiple of num_generations={args.num_generations}."
            )
        super().__init__(
            model=PolicyModel(policy),
            reward_funcs=_no_reward,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["-"] * max(1, args.generation_batch_size)}),
            processing_class=_tokenizer(),
            **options,
        )
        self.rollouts: Rollouts | None = None
        self._instructions: list[str] = []
        self._round: int | None = None
        self._rows = rows
        self._collector = GroupCollector(
            env,
            policy,  # type: ignore[arg-type]
            group_size=args.num_generations,
            num_groups=rows // args.num_generations,
            max_groups=max(max_groups, rows // args.num_generations),
            temperature=args.temperature,
            max_flagged=max_flagged,
            scale_rewards=args.scale_rewards,
            baseline=baseline,
            seed=mix(args.seed, self.accelerator.process_index),
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Roll out groups; one row per trusted rollout, padded with empty rows to the batch size."""
        self._round = self.state.global_step if self._round is None else self._round + 1
        self.rollouts = self._collector.collect(self._round)
        for name, value in self.rollouts.metrics().items():
            self._metrics["train"][name].append(float(value))
        batch = Batch.of(self.rollouts)
        device = self.accelerator.device
        lengths = torch.bincount(batch.trajectory).tolist()
        n, length = len(lengths), batch.tokens.shape[1]

        def rows(chunks: Tensor) -> Tensor:
            """A value per chunk -> (rows, T, ...), zero where there is no chunk."""
            padded = pad_sequence(list(chunks.split(lengths)), batch_first=True)
            return torch.cat([padded, padded.new_zeros(self._rows - n, *padded.shape[1:])]).to(device)

        mask = rows(torch.ones(len(batch.tokens), length, dtype=torch.int64)).flatten(1)
        first = batch.trajectory.new_tensor([0, *lengths]).cumsum(0)[:-1]
        self._instructions = [batch.instructions[i] for i in first.tolist()]
        advantages = torch.zeros(self._rows, device=device)
        advantages[:n] = batch.advantages.to(device) * self._share(mask[:n], batch.row_weights.to(device))
        return {
            "prompt_ids": torch.arange(self._rows, device=device)[:, None].clamp(max=n - 1),
            "prompt_mask": torch.ones(self._rows, 1, dtype=torch.int64, device=device),
            "completion_ids": rows(batch.tokens).flatten(1),
            "completion_mask": mask,
            "old_per_token_logps": rows(batch.old_logprobs).flatten(1),
            "advantages": advantages,
            "num_items_in_batch": self.accelerator.reduce(mask.sum(), reduction="sum"),
            "pixel_values": rows(batch.images),
        }

    def _share(self, mask: Tensor, row_weights: Tensor) -> Tensor:
        """Our weight of each row's tokens over TRL's, (N,): not 1 where groups differ in their trusted members."""
        ours = token_weights(mask, self.loss_type, row_weights)[:, 0]
        theirs = 1 / (self._rows * mask.sum(1)) if self.loss_type == "grpo" else 1 / mask.sum()
        return ours / theirs

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **inputs: Any
    ) -> tuple[Tensor, Tensor, None]:
        """Log-probabilities and entropies (N, T * L); 0 where there is no chunk."""
        images = inputs["pixel_values"]
        n, t = images.shape[:2]
        tokens, present = (
            input_ids[:, 1:].unflatten(1, (t, -1)),
            attention_mask[:, 1:].unflatten(1, (t, -1))[:, :, 0] > 0,
        )
        owner = input_ids[:, :1].long().expand(n, t)[present].tolist()
        texts = [self._instructions[row] for row in owner]
        both = model(images[present], texts, tokens[present], self.temperature)
        logprobs, entropies = (x.new_zeros(*tokens.shape).index_put((present,), x).flatten(1) for x in both)
        return logprobs, entropies, None


def _no_reward(completions: list[Any], **columns: Any) -> list[float]:
    """Never called: rewards come from the environment."""
    raise AssertionError("rewards come from the environment")


def _tokenizer() -> PreTrainedTokenizerFast:
    """TRL wants one; instructions are not tokenized here."""
    fast: Any = PreTrainedTokenizerFast  # untyped in transformers
    tokenizer: PreTrainedTokenizerFast = fast(
        tokenizer_object=Tokenizer(models.WordLevel({"-": 0, "<end>": 1}, unk_token="-")),
        pad_token="-",
        eos_token="<end>",
    )
    return tokenizer
