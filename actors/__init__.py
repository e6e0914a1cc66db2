"""Plain classes, one per kind of long-lived process: rollout actor, trainer, environment worker."""
