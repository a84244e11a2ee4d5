"""The model: embed, encode, project, splice, decode, loss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from model.audio.state_head import StateHead
from model.batch import Batch, Media
from model.encoder import Encoder
from model.errors import ConfigError
from model.files.sharding import is_sharded_module
from model.generate import GenerationOptions, Prompts, generate
from model.llm.causal_lm import head_weight
from model.llm.decoder_options import decoder_options, masked_attention
from model.llm.early_features import widened
from model.llm.interface import CausalLM
from model.llm.new_tokens import new_head_rows
from model.llm.picture_attention import pictures_of
from model.llm.router_loss import RouterTap
from model.loss import HeadOptions, LossTerm, Term, text_term
from model.media_spec import MediaSpec
from model.patch_layout import blank_media
from model.preference.tuning import PreferenceTuning
from model.projector import OWN_ROWS
from model.splice import placeholder_rows, splice
from model.vision.normalise import normalised

ENCODERS = {"image": ("vision", "vision_projector"), "audio": ("audio", "audio_projector")}
"""Encoder and projector by modality. A new modality is an entry here, not a branch in the code below."""


class MultimodalLM(nn.Module):
    """A causal language model that reads media through encoders and projectors. Attribute names are the parts' names."""

    def __init__(self, llm: CausalLM, parts: dict[str, nn.Module], specs: dict[str, MediaSpec], dtype: torch.dtype) -> None:
        super().__init__()
        self.llm = llm
        for name, part in parts.items():
            self.add_module(name, part)
        self.specs = specs
        self.dtype = dtype  # compute type; parameters may be stored in another one
        self.trainable_parts: frozenset[str] = frozenset()
        self.routers: RouterTap | None = None
        self.preference: PreferenceTuning | None = None  # what is learned from answers that are compared
        self.stop_ids: tuple[int, ...] = ()
        self.pad_id = 0
        self.selects_rows = False  # the last block can compute the supervised rows alone (model.last_block)
        self.levels = 1  # rows of numbers, each as wide as the language model, that a position is given (model.llm.early_features)
        self.compute_device: torch.device | None = None  # where weights are kept elsewhere than they are computed with

    @property
    def other_terms(self) -> dict[str, LossTerm]:
        """Return the loss terms beside the text term, by name. A new term is an entry here."""
        sources: dict[str, LossTerm | None] = {"state": getattr(self, "state_head", None), "router": self.routers}
        return {name: source for name, source in sources.items() if source is not None}

    def coefficients(self) -> dict[str, float]:
        """Return the factor of each term in the loss; that of the text comes first and is 1."""
        first = {"text": 1.0} if self.preference is None else self.preference.coefficients()
        return {**first, **{name: source.coefficient for name, source in self.other_terms.items()}}

    def counts(self, batches: Sequence[Batch]) -> dict[str, Tensor | float]:
        """Return the divisor of the sum of each term over `batches`, known before the forward. No host sync."""
        counts: dict[str, Tensor | float] = {"text": float(sum(batch.num_supervised for batch in batches))}
        if self.preference is not None:
            counts |= self.preference.counts(batches)
        for name, source in self.other_terms.items():
            counts[name] = sum(source.count(batch) for batch in batches)
        return counts

    def forward(self, batch: Batch) -> dict[str, Term]:
        """Compute the loss terms of a micro-batch, named as in `coefficients`; `text` is the cross entropy of supervised tokens."""
        if self.routers is not None:
            self.routers.listen()
        if self.preference is not None:
            found, hidden = self.preference.compute(self, batch)
            return {**found, **{name: source.term(hidden, batch) for name, source in self.other_terms.items()}}
        # Other terms read other rows.
        rows = batch.supervised if self.selects_rows and not self.other_terms else None
        hidden = self.decode(batch, rows)
        weight = head_weight(self.llm).to(self.dtype)
        new = new_head_rows(self.llm, self.dtype)
        text = text_term(hidden, weight, batch.labels, batch.supervised, HeadOptions(change=self.llm.logit_change, new=new))
        return {"text": text, **{name: source.term(hidden, batch) for name, source in self.other_terms.items()}}

    def decode(self, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """Compute the decoder's last hidden state (B, T, D); given flat positions `rows` (S,), of these alone (1, S, D).

        Those who ask for `rows` may be given all, where the last block is none that can choose (`selects_rows`).
        """
        return self.decode_embeds(self.embed(batch), batch, rows)

    def decode_embeds(self, embeds: Tensor, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """Compute what `decode` does from embeddings (B, T, D)."""
        decoder = self.llm.get_decoder()
        options = decoder_options(self.llm, batch, embeds)
        if rows is not None:
            options["supervised_rows"] = rows
        return decoder(inputs_embeds=embeds, position_ids=batch.position_ids, use_cache=False, **options).last_hidden_state

    def user_state(self, batch: Batch) -> Tensor:
        """Return probabilities (M, classes) float32 of the user's state after each of the M clips of `batch`, in reading order.

        Rows may be padded on either side, or packed. Raises `ConfigError` if the model has no [model.state_head].
        """
        head = getattr(self, "state_head", None)
        if not isinstance(head, StateHead):
            raise ConfigError("this model reads no user state: it was built without [model.state_head]")
        batch = batch.to(self._device())
        # Prompts are padded on the left, so causality alone does not hide the padding.
        attention = masked_attention(self.llm) if batch.segment_lengths is None else nullcontext()
        with torch.no_grad(), attention:
            return head.logits(self.decode(batch), batch).softmax(-1)

    def embed(self, batch: Batch) -> Tensor:
        """Embed input_ids (B, T) with media spliced in -> (B, T, D), or (B, T, D * levels) for a decoder with early features.

        Every modality takes part in every batch, with no rows where there is no media: ranks must run the same collectives, and
        trainable parts must get a gradient, whatever their batch holds.
        """
        embeds = widened(self.llm.get_input_embeddings()(batch.input_ids), self.levels)
        for modality in self.specs:
            media = batch.media.get(modality)
            features = self._features(modality, media)
            embeds = splice(embeds, features, media or self._no_media(modality))
        return embeds

    def encoder(self, name: str) -> Encoder:
        """Return the part `name`, vision or audio. Raises `TypeError` for a part that encodes no media."""
        found = self.get_submodule(name)
        if not isinstance(found, Encoder):
            raise TypeError(f"{name} is a {type(found).__name__}, no encoder")
        return found

    def _features(self, modality: str, media: Media | None) -> Tensor:
        """Return the projected feature rows (K, D) of one modality; K = 0 when the batch holds none."""
        encoder_name, projector_name = ENCODERS[modality]
        encoder, projector = self.encoder(encoder_name), self.get_submodule(projector_name)
        trainable = encoder_name in self.trainable_parts
        if media is None and not trainable and not is_sharded_module(encoder.tower):
            media = self._no_media(modality)
            shape = (1, encoder.blank_length * len(media.values), encoder.hidden_size)
            encoded = torch.zeros(shape, dtype=self.dtype, device=self._device())
        else:
            media = media or self._no_media(modality)
            with torch.set_grad_enabled(trainable and torch.is_grad_enabled()):
                values = normalised(media.values, self.specs[modality], self.dtype)
                encoded = encoder(values, media.lengths, media.patches)  # (N, L, C)
        rows = projector(encoded, encoder.valid_rows(media.lengths)).flatten(0, 1)
        for name in OWN_ROWS:
            if (extra := getattr(projector, name, None)) is not None:
                rows = torch.cat([rows, extra.reshape(-1, rows.shape[-1]).to(rows.dtype)])
        return placeholder_rows(rows, media)

    def _no_media(self, modality: str) -> Media:
        return blank_media(self.specs[modality], self._device())

    def _device(self) -> torch.device:
        return self.compute_device or next(self.llm.parameters()).device

    def train(self, mode: bool = True) -> MultimodalLM:
        """Set training mode for trainable parts; frozen parts stay in eval mode, whatever `mode` is."""
        super().train(mode)
        for name, part in self.named_children():
            part.train(mode and name in self.trainable_parts)
        return self

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Return the summed cross entropy () and the number of supervised positions: the text term of training, without a graph."""
        with torch.no_grad():
            term = self(batch.to(self._device()))["text"]
        return term.sum, term.num_addends

    def generate(
        self,
        batch: Batch,
        max_new_tokens: int = 32,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        together: bool = False,
    ) -> list[list[int]]:
        """Generate token ids for each row, up to the stop token, which is left out. Prompts are padded on the left.

        `temperature`, `top_p`, `seed` and `together`, a collective, are those of `model.generate.GenerationOptions`.
        """
        options = GenerationOptions(max_new_tokens, self.stop_ids, self.pad_id, temperature, top_p, seed, together)
        return self.generate_with(batch, options)

    def generate_with(self, batch: Batch, options: GenerationOptions) -> list[list[int]]:
        """Generate token ids for each row as `options` say."""
        batch = batch.to(self._device())
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        with torch.no_grad():
            embeds = self.embed(batch)
        axes = batch.position_ids if batch.position_ids.ndim == 3 else None
        return generate(self.llm, Prompts(embeds, mask, axes, pictures_of(self.llm, batch)), options)
