"""A model reads, by either of its two forms: the one seam between evaluations and models.

Axes: b row, l position, k question, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.config import Form
from mamba2lm.data import IGNORED
from mamba2lm.models import LanguageModel, ModelState


class Reader:
    """Give a model's losses and logits, in parallel or one token after another."""

    def __init__(
        self, model: LanguageModel, form: Form = Form.parallel, *, chunk: int = 4096
    ) -> None:
        """Bind a model to the form it shall run in.

        Args:
            model: On the device it shall run on.
            form: How it reads; the results agree.
            chunk: Most tokens of a row read at once by the parallel form. What came before is
                carried in the state, so it bounds memory and changes nothing else.
        """
        self.model, self.form, self.chunk = model, form, chunk

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.embedding.weight.device

    @torch.inference_mode()
    def losses(
        self, ids_bl: Tensor, labels_bl: Tensor, state: ModelState | None = None
    ) -> tuple[Tensor, ModelState | None]:
        """Return the loss at every position.

        Args:
            ids_bl: (b, l) int64.
            labels_bl: (b, l) int64, −100 where nothing is asked.
            state: What came before, not changed; None for nothing.

        Returns:
            Nats (b, l), 0 where nothing is asked; and the state afterwards, None if none was
            passed.
        """
        ids_bl, labels_bl = self._moved(ids_bl), self._moved(labels_bl)
        wanted = state is not None
        losses: list[Tensor] = []
        if self.form is Form.parallel:
            if state is None and ids_bl.shape[1] > self.chunk:
                state = self.model.new_state(ids_bl.shape[0])
            for ids, labels in zip(
                ids_bl.split(self.chunk, dim=1), labels_bl.split(self.chunk, dim=1), strict=True
            ):
                output = self.model(ids, labels=labels, state=state, loss_reduction="none")
                state = output.state
                losses.append(output.loss)
            return torch.cat(losses, dim=1), state if wanted else None
        after = self._begin(ids_bl, state)
        for ids_b, labels_b in zip(ids_bl.unbind(1), labels_bl.unbind(1), strict=True):
            logits_bv, after = self.model.step(ids_b, after)
            losses.append(
                F.cross_entropy(logits_bv, labels_b, ignore_index=IGNORED, reduction="none")
            )
        return torch.stack(losses, dim=1), after if wanted else None

    @torch.inference_mode()
    def logits(self, ids_bl: Tensor, positions_bk: Tensor) -> Tensor:
        """Return the logits at some positions of rows that begin from nothing.

        Args:
            ids_bl: (b, l) int64.
            positions_bk: (b, k) int64.

        Returns:
            (b, k, v), float32 at least.
        """
        ids_bl, positions_bk = self._moved(ids_bl), self._moved(positions_bk)
        length = ids_bl.shape[1]
        if self.form is Form.parallel and length <= self.chunk:
            return self.model(ids_bl, positions=positions_bk).logits
        found_bkv: Tensor | None = None
        state = self.model.new_state(ids_bl.shape[0])
        size = 1 if self.form is Form.recurrent else self.chunk
        asked = set(torch.unique(positions_bk // size).tolist())
        for number, part_bl in enumerate(ids_bl.split(size, dim=1)):
            place_bk = positions_bk - number * size
            here_bk = (place_bk >= 0) & (place_bk < part_bl.shape[1])
            place_bk = place_bk.clamp(0, part_bl.shape[1] - 1)
            if number not in asked:
                place_bk = place_bk[:, :0]
            if self.form is Form.recurrent:
                logits_bv, state = self.model.step(part_bl[:, 0], state)
                logits_bkv = logits_bv[:, None].expand(-1, place_bk.shape[1], -1)
            else:
                output = self.model(part_bl, state=state, positions=place_bk)
                logits_bkv, state = output.logits, output.state
            if number in asked:
                if found_bkv is None:
                    found_bkv = torch.zeros(
                        *positions_bk.shape,
                        logits_bkv.shape[-1],
                        dtype=logits_bkv.dtype,
                        device=self.device,
                    )
                found_bkv = torch.where(here_bk[..., None], logits_bkv, found_bkv)
        assert found_bkv is not None, "positions lie outside the rows"
        return found_bkv

    def answers(self, ids_bl: Tensor, positions_bk: Tensor) -> Tensor:
        """Return the most likely ids at some positions, (b, k) int64."""
        return self.logits(ids_bl, positions_bk).argmax(dim=-1)

    def continuations(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int
    ) -> list[tuple[float, bool]]:
        """Score continuations of contexts.

        Args:
            pairs: Ids of a context and of what follows it, each with at least one.
            batch_size: Rows read together.

        Returns:
            For each pair log p of the continuation in nats, and whether every token of it is the
            most likely one (so that greedy decoding gives it).
        """
        results: list[Any] = [None] * len(pairs)
        # Rows of like length together.
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            rows = [[*pairs[i][0], *pairs[i][1]] for i in members]
            targets = [list(pairs[i][1]) for i in members]
            # The last token of a continuation is never read.
            ids_bl = pad([row[:-1] for row in rows], 0)
            target_bk = pad(targets, IGNORED).to(self.device)
            position_bk = pad(
                [
                    range(len(row) - 1 - len(target), len(row) - 1)
                    for row, target in zip(rows, targets, strict=True)
                ],
                0,
            )
            log_p_bkv = self.logits(ids_bl, position_bk).log_softmax(dim=-1)
            counts_bk = target_bk != IGNORED
            found_bk = log_p_bkv.gather(2, target_bk.clamp(min=0)[..., None])[..., 0]
            total_b = found_bk.double().masked_fill(~counts_bk, 0.0).sum(dim=1)
            greedy_b = ((log_p_bkv.argmax(dim=-1) == target_bk) | ~counts_bk).all(dim=1)
            for i, total, greedy in zip(members, total_b.tolist(), greedy_b.tolist(), strict=True):
                results[i] = (total, greedy)
        return results

    def _moved(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the model's device, not waiting for what a GPU still has to do."""
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _begin(self, ids_bl: Tensor, state: ModelState | None) -> ModelState:
        # A step may write into the state it is given.
        return self.model.new_state(ids_bl.shape[0]) if state is None else state.clone()


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Return rows as (b, l), filled up on the right, where a causal model sees nothing of it."""
    length = max(len(row) for row in rows)
    filled = [[*row, *[value] * (length - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.int64)
