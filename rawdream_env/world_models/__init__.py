"""World models: the action-conditioned Wan transformer, its autoencoder, sampler and rollout, and small twins."""
