"""TL-Training's weights of key tokens (arXiv:2412.15495): the few tokens that name the tool count
as much as the many that follow."""

import numpy as np

MOST = 9.0


def key_token_weights(key: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Loss weights [T] float64 of one sequence: w on its key tokens, 1 elsewhere.

    `key` [T] bool marks tool-name tokens, `trained` [T] bool the tokens in the loss. w =
    min(n_other / n_key, 9) where n_key < n_other, else 1; both count trained tokens.
    """
    mine = key & trained
    keys, others = int(mine.sum()), int((trained & ~key).sum())
    weights = np.ones(len(key), dtype=np.float64)
    if 0 < keys < others:
        weights[mine] = min(others / keys, MOST)
    return weights
