"""The bundled policy as a stable-baselines3 policy: actor-critic algorithms start from it instead of from scratch.

Shape letters: B rows, H W image, K actions in a chunk, A action dimensions, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gymnasium import spaces

from rawdream_env.errors import InvalidOptionError, MissingDependencyError
from rawdream_env.policies import load_policy

try:
    from stable_baselines3.common.distributions import MultiCategoricalDistribution
    from stable_baselines3.common.policies import ActorCriticPolicy
except ImportError as error:
    raise MissingDependencyError(
        "SB3TokenPolicy needs stable-baselines3, which is not installed: pip install 'rawdream-env[sb3]'."
    ) from error
from torch import Tensor, nn

CRITIC_GAIN = 10.0
"""Scale of the critic's output. stable-baselines3 has one learning rate, and one that suits the trained actor is slow for
the new critic; under Adam the gain multiplies the critic's."""
_CRITIC_BATCH = 256


class SB3TokenPolicy(ActorCriticPolicy):
    """An ``ActorCriticPolicy`` whose actor is the bundled policy and whose critic reads its features.

    ::

        envs = gym.make_vec("rawdream/PiperDream-v0", num_envs=16, autoreset_mode="SameStep")
        envs = SB3VecEnv(TokenActions(InstructionObservation(envs, words=True)), end_at_horizon=True)
        model = PPO(SB3TokenPolicy, envs, n_steps=8, gamma=1.0, policy_kwargs={"temperature": 0.7})
        model.learn(10_000)
        model.policy.actor.save_pretrained("runs/ppo/policy")

    The log-probability of an action is the sum of the policy's own ``logprobs`` over its K*A tokens, and deterministic
    actions are its greedy ones. The critic is a small network on detached features, so that it never changes the actor.
    ``PPO.load`` builds ``policy`` again, then loads the trained weights into it.

    Args:
        observation_space: a ``Dict`` with ``image`` and ``instruction``, of ``InstructionObservation(words=True)``.
        action_space: of ``TokenActions``.
        lr_schedule: of stable-baselines3.
        policy: where the actor starts: "embedded" (the bundled policy) or a checkpoint folder of the same kind.
        temperature: of sampling and log-probabilities, positive.
        critic_width: hidden units of the critic.
        **kwargs: of ``ActorCriticPolicy``; those that describe a network have no effect.

    Raises:
        InvalidOptionError: spaces, policy or temperature that do not fit.
        CheckpointError: the folder is missing or damaged.
    """

    action_dist: MultiCategoricalDistribution

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Any,
        *,
        policy: str | Path = "embedded",
        temperature: float = 0.7,
        critic_width: int = 128,
        **kwargs: Any,
    ) -> None:
        if not temperature > 0:
            raise InvalidOptionError(f"temperature must be positive, got {temperature}.")
        self.start, self.temperature, self.critic_width = str(policy), temperature, critic_width
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        from rawdream_env.policies.tiny_vla import TinyVLA

        actor = load_policy(self.start)
        if not isinstance(actor, TinyVLA):
            raise InvalidOptionError(f"SB3TokenPolicy starts from a TinyVLA, not from a {type(actor).__name__}.")
        _check_spaces(actor, self.observation_space, self.action_space)
        self.actor = actor
        width = 3 * actor.config.width
        self.critic = nn.Sequential(nn.Linear(width, self.critic_width), nn.SiLU(), nn.Linear(self.critic_width, 1))
        head = self.critic[-1]
        assert isinstance(head, nn.Linear)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        # The networks that the base class would build are not needed.
        del self.features_extractor, self.pi_features_extractor, self.vf_features_extractor
        optimizer_class: Any = self.optimizer_class  # declared as the base class, which takes no learning rate
        self.optimizer = optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Actions (B, K*A), values (B, 1) and log-probabilities (B,) for a batch of observations."""
        distribution, values = self._evaluate(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, values, distribution.log_prob(actions)

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values (B, 1), log-probabilities (B,) of ``actions`` (B, K*A) and entropies (B,)."""
        distribution, values = self._evaluate(obs)
        return values, distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: Any) -> MultiCategoricalDistribution:
        """The distribution over the tokens of a chunk."""
        return self._evaluate(obs)[0]

    def predict_values(self, obs: Any) -> Tensor:
        """Values (B, 1)."""
        return self._evaluate(obs)[1]

    @torch.no_grad()
    def critic_features(self, obs: Any) -> Tensor:
        """What the critic reads of a batch of observations: (B, 3 D), detached."""
        return self._features(obs)[0].flatten(1)

    def fit_critic(self, features: Tensor, returns: Tensor, optimizer: torch.optim.Optimizer, steps: int) -> float:
        """Regress the critic on returns (B,) with an optimizer of its own, ``steps`` random batches of 256 rows.

        PPO takes a few steps per rollout, which the actor needs to be small; a new critic needs more. An advantage over
        a critic that does not know how hard a task is makes the policy forget the hard tasks. Returns the last loss.
        """
        loss = features.new_zeros(())
        for _ in range(steps):
            rows = torch.randint(len(features), (min(_CRITIC_BATCH, len(features)),))
            loss = nn.functional.mse_loss(self._values(features[rows]).flatten(), returns[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    def _features(self, obs: Any) -> tuple[Tensor, Tensor]:
        frames = obs["image"]
        if tuple(frames.shape[1:3]) != self.actor.image_size:  # stable-baselines3 puts the channels first
            frames = frames.permute(0, 2, 3, 1)
        found: tuple[Tensor, Tensor] = self.actor.features(frames, obs["instruction"])
        return found

    def _evaluate(self, obs: Any) -> tuple[MultiCategoricalDistribution, Tensor]:
        registers, steps = self._features(obs)
        logits = self.actor.token_logits(steps) / self.temperature
        values = self._values(registers.detach().flatten(1))
        return self.action_dist.proba_distribution(action_logits=logits.flatten(1)), values

    def _values(self, features: Tensor) -> Tensor:
        values: Tensor = CRITIC_GAIN * self.critic(features)
        return values

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = {"policy": self.start, "temperature": self.temperature, "critic_width": self.critic_width}
        return {**super()._get_constructor_parameters(), **own}


def _check_spaces(actor: Any, observations: Any, actions: Any) -> None:
    """Whether a ``TinyVLA`` reads these observations and writes these actions."""
    if not isinstance(observations, spaces.Dict) or {"image", "instruction"} - set(observations.spaces):
        raise InvalidOptionError(
            "SB3TokenPolicy needs observations with 'image' and 'instruction': wrap the environment in "
            "InstructionObservation(env, words=True)."
        )
    size, shape = (*actor.image_size, 3), observations["image"].shape
    if shape not in (size, (3, *actor.image_size)):
        raise InvalidOptionError(f"the policy reads images of shape {size}, the environment shows {shape}.")
    if not isinstance(actions, spaces.MultiDiscrete) or actions.shape != (actor.num_action_tokens,):
        raise InvalidOptionError(
            f"SB3TokenPolicy writes {actor.num_action_tokens} action tokens, not {actions}: wrap the environment in "
            "TokenActions(env)."
        )
