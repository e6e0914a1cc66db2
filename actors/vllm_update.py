"""How the vLLM engine takes a publish: receive and prove, pause, load, number the version, resume.

    kind        in vLLM's worker (`vllm_transfer.py`)          here
    weights     received, layers reloaded                      update_weights of vLLM's interface
    adapter     received, written where vLLM's loader reads    add_lora in place; every request
                it, read back                                  carries the adapter

Whether running sequences keep their keys and values is the pause's `clear_cache`. Where they do
(`continue`), later requests must not read what older weights left in the prefix cache: every
request carries its policy version as the salt of its prefix.
"""

import time
from typing import TYPE_CHECKING, Any

from loopwright.actors.engine import EngineError, EngineSettings, OnUpdate
from loopwright.actors.vllm_setup import CheckpointLayout
from loopwright.actors.weights import ChannelLost, WeightManifest, decode, encode, wrong_dtypes

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM


class Updates:
    """What one vLLM engine serves, and the steps from one version to the next."""

    def __init__(self, settings: EngineSettings) -> None:
        """Version 0: what the model folder holds, without an adapter."""
        self._settings = settings
        self.version = 0
        self.adapter: LoRARequest | None = None
        self.asleep = False
        self.broken = ""  # why nothing may be served any more
        self._checkpoint: CheckpointLayout | None = None

    @property
    def salt(self) -> str:
        """Of the prefixes of requests that begin now."""
        return f"version {self.version}"

    def check(self, llm: "AsyncLLM", manifest: WeightManifest) -> None:
        """Raise `EngineError` for a publish that this model cannot take."""
        whole = manifest
        if manifest.kind == "adapter":
            if not self._settings.lora_rank:
                raise EngineError(
                    f"publish of version {manifest.version} is an adapter, and this engine was "
                    f"started without room for one; set its lora_rank"
                )
            if not manifest.base:
                return  # known from an earlier one
            whole = decode(manifest.base)
        if self._checkpoint is None:
            self._checkpoint = CheckpointLayout.of(llm.model_config.hf_config)
        shapes = dict(zip(whole.names, whole.shapes, strict=True))
        problems = self._checkpoint.problems(shapes)
        problems += wrong_dtypes(whole, self._settings.dtype)
        if problems:
            raise EngineError(
                f"publish of version {manifest.version} does not describe "
                f"{self._settings.model_path!r}: {'; '.join(problems)}. Publish every parameter of "
                f"the model that the engine was started with"
            )

    async def receive(
        self, llm: "AsyncLLM", manifest: WeightManifest
    ) -> tuple[dict[str, int], str]:
        """Let the worker take and prove the publish, touching nothing that is served; checksums,
        and the folder of an adapter. Raises `EngineError` or `ChannelLost`."""
        answers: list[dict[str, Any]] = await llm.collective_rpc(
            "receive_published_weights", kwargs={"manifest": encode(manifest)}
        )
        for answer in answers:
            if answer["lost"]:
                raise ChannelLost(answer["lost"])
            if answer["refusal"]:
                raise EngineError(
                    f"publish of version {manifest.version} is refused, the former stays: "
                    f"{answer['refusal']}"
                )
        return dict(answers[0]["checksums"]), str(answers[0]["folder"])

    async def sleep(self, llm: "AsyncLLM") -> None:
        """Stand still without keys and values; on a GPU without weights too."""
        if not self.asleep:
            await llm.pause_generation(mode="keep", clear_cache=True)
            if self._settings.device != "cpu":  # vLLM cannot give back memory on a CPU
                await llm.sleep(level=2, mode="keep")
            self.asleep = True

    async def swap(
        self, llm: "AsyncLLM", manifest: WeightManifest, folder: str, on_update: OnUpdate
    ) -> float:
        """Pause, load, resume; returns when generation began to stand still."""
        still_from = time.monotonic()
        try:
            if self.asleep:
                if self._settings.device != "cpu":
                    await llm.wake_up(tags=["weights"])
            elif on_update == "finish":
                await llm.pause_generation(mode="wait", clear_cache=True)
                still_from = time.monotonic()
            else:
                await llm.pause_generation(mode="keep", clear_cache=on_update == "recompute")
            if folder:
                await self._load_adapter(llm, manifest.version, folder)
            else:
                await self._load(llm, manifest.version)
            if self.asleep and self._settings.device != "cpu":
                await llm.wake_up(tags=["kv_cache"])
        finally:
            if not self.broken:
                self.asleep = False
                await llm.resume_generation()
        return still_from

    async def _load(self, llm: "AsyncLLM", version: int) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self.broken = (
            f"loading version {version} did not finish, so its layers hold parts of two versions; "
            f"close it and start another"
        )
        try:
            await llm.start_weight_update()
            await llm.update_weights(WeightTransferUpdateRequest(update_info={"version": version}))
            await llm.finish_weight_update(str(version))
            self.version = int(await llm.get_weight_version())
        except Exception as error:  # vLLM raises the worker's failures as bare exceptions
            raise EngineError(f"loading version {version} failed in vLLM: {error}") from error
        self.broken = ""

    async def _load_adapter(self, llm: "AsyncLLM", version: int, folder: str) -> None:
        from vllm.lora.request import LoRARequest

        try:
            await llm.add_lora(LoRARequest("policy", 1, folder, load_inplace=True))
            await llm.update_weight_version(str(version))
            self.version = int(await llm.get_weight_version())
        except Exception as error:
            self.broken = f"vLLM took no adapter of version {version}; close it and start another"
            raise EngineError(f"adapter of version {version}: vLLM: {error}") from error
        self.adapter = LoRARequest("policy", 1, folder)
        await llm.collective_rpc("forget_adapter_files")  # vLLM has read them
