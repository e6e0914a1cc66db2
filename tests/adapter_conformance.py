"""What every engine with room for adapters must do with them."""

from typing import Any

import numpy as np
import pytest

from loopwright.actors.channels.adapter import BackendAdapters
from loopwright.actors.channels.channel import open_channel
from loopwright.actors.channels.settings import ChannelSettings
from loopwright.actors.engine import EngineError
from loopwright.actors.weights import manifest_checksums
from tests.engine_conformance import EngineBench, Staged, prompts, reference_logprobs
from tests.weight_sources import Adapted, flip_bit


def check_adapters(
    bench: EngineBench, tolerance: float, carrier: Any = "shared_memory", kind: str = "lora"
) -> None:
    """Two adapters one after the other over a base that is published once; then a damaged one.

    The engine must have been started from `bench.model`, with room for adapters.
    """
    chosen = ChannelSettings(channel="adapter", carrier=carrier, bucket_bytes=1 << 14)
    channel, tokens = open_channel(chosen, "test-conformance"), prompts(20, [40])[0]
    base = bench.model
    adapted = Adapted(base, 1, kind)
    try:
        for seed in (1, 2):
            adapted.model.load_state_dict(Adapted(base, seed, kind).model.state_dict())
            source = BackendAdapters(adapted)
            manifest = channel.publish(bench.version + 1, source, ("engine/0",))
            assert manifest.kind == "adapter" and manifest.size_bytes < 100_000
            report = bench.run(bench.take(Staged(adapted.model, manifest), "recompute"))
            assert dict(report.checksums) == manifest_checksums(manifest)
            probed = bench.run(bench.engine.probe(tokens[:2]))
            expected = reference_logprobs(adapted.model, tokens[:1], tokens[1:2])
            np.testing.assert_allclose(probed, expected, atol=tolerance, rtol=0)
            request = bench.request(tokens)
            (completion,) = bench.generate([request])
            expected = reference_logprobs(adapted.model, tokens, completion.token_ids)
            np.testing.assert_allclose(completion.logprobs, expected, atol=tolerance, rtol=0)
            assert (completion.versions == bench.version).all()
        if carrier == "shared_memory":
            manifest = channel.publish(bench.version + 1, BackendAdapters(adapted), ("engine/0",))
            flip_bit(manifest.segment, manifest.offsets[3] + 7)
            with pytest.raises(EngineError, match=manifest.names[3]):
                bench.run(bench.engine.update_weights(manifest, "continue"))
    finally:
        channel.close()
