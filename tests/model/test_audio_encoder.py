"""Audio features are transformers' own; a clip has the same ones and as many tokens alone as beside others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import WhisperModel

from model.audio.encoder import AudioEncoder, audio_config, audio_spec
from model.audio.projector import build_audio_projector, mean_of_pairs, projector_strides
from model.config import AudioConfig, AudioProjectorConfig
from model.errors import ConfigError
from model.media_spec import AudioSpec, MediaMeta, num_tokens, row_frames, row_shape, row_tokens, row_width, token_rows
from model.weights.bases import audio_tensors
from model.weights.initial_values import initial_tensors
from model.weights.materialise import Layer, materialise, parameters_on_meta
from tests.support.tiny_audio import MELS, joined, save_qwen2_audio, save_whisper, wave

CLIPS = [0.3, 0.37, 3.54, 29.9, 65.0]  # an odd number of frames is where a stride could reach past the end
KINDS = ["linear", "mlp2x_gelu", "pool_mlp", "conv_mlp", "vita_conv"]
TOKENS = {  # of the clips, by hand: halved by the encoder, then by each stride of the projector, always rounded up
    "linear": [15, 19, 177, 1495, 1500 + 1500 + 250],
    "mlp2x_gelu": [15, 19, 177, 1495, 3250],
    "pool_mlp": [8, 10, 89, 748, 750 + 750 + 125],
    "conv_mlp": [4, 5, 45, 374, 375 + 375 + 63],
    "vita_conv": [8, 10, 89, 748, 1625],
}


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whisper(tmp_path_factory.mktemp("whisper"))


def part(name: str, module: nn.Module, layer: Layer) -> None:
    """Weights of `layer` into a module that stands as part `name`."""
    root = nn.ModuleDict({name: module})
    materialise(root, [layer], frozen_dtype=torch.float32, device=torch.device("cpu"))


def encoder(folder: Path, window: str = "full") -> AudioEncoder:
    """Ours, with the folder's weights."""
    value = audio_config(AudioConfig(str(folder)))
    with parameters_on_meta():
        built = AudioEncoder(value, window == "full")
    part("audio", built, Layer(str(folder), lambda: audio_tensors(str(folder), built)))
    return built.eval().requires_grad_(False)


def projector(kind: str, prompts: int = 0, in_features: int = 24, out_features: int = 16) -> nn.Module:
    with parameters_on_meta():
        built = build_audio_projector(AudioProjectorConfig(kind, prompts=prompts), in_features, out_features)
    part("audio_projector", built, Layer("new", lambda: initial_tensors("audio_projector", built, 5)))
    return built


def spec_of(folder: Path, window: str = "full", kind: str = "linear", prompts: int = 0) -> AudioSpec:
    return audio_spec(AudioConfig(str(folder), window=window), AudioProjectorConfig(kind, prompts=prompts))  # type: ignore[arg-type]


def test_features_are_those_of_transformers(whisper: Path) -> None:
    rows, lengths = joined([wave(s) for s in CLIPS], spec_of(whisper))
    theirs = WhisperModel.from_pretrained(whisper, attn_implementation="sdpa").encoder.eval()
    with torch.no_grad():
        expected = theirs(rows).last_hidden_state
    found = encoder(whisper)(rows, lengths)
    assert found.shape == (7, 1500, 24)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # A full row hears the same in its own window as in Whisper's: nothing of it is padding.
    own = encoder(whisper, "clip")(rows[4:6], lengths[4:6])
    torch.testing.assert_close(own, expected[4:6], rtol=0, atol=1e-5)


def tokens_of(waves: list[Tensor], folder: Path, window: str, kind: str) -> list[Tensor]:
    """Projected tokens (K, D) of each clip, out of one batch of all of them."""
    spec = spec_of(folder, window, kind)
    rows, lengths = joined(waves, spec)
    built = encoder(folder, window)
    with torch.no_grad():
        projected = projector(kind)(built(rows, lengths), built.valid_rows(lengths))
    width = row_width(spec, rows.shape[-1])
    assert projected.shape[1] == width
    flat, first, found = projected.flatten(0, 1), 0, []
    for one in waves:
        meta = MediaMeta(num_frames=-(-len(one) // spec.hop))
        found.append(flat[torch.from_numpy(token_rows(spec, meta, width)) + first * width])
        assert len(found[-1]) == num_tokens(spec, meta)
        first += len(row_frames(spec, meta))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", ["full", "clip"])
def test_a_clip_is_the_same_alone_and_beside_others(whisper: Path, window: str, kind: str) -> None:
    waves = [wave(seconds) for seconds in CLIPS]
    together = tokens_of(waves, whisper, window, kind)
    assert [len(tokens) for tokens in together] == TOKENS[kind]
    for one, tokens in zip(waves, together):
        (alone,) = tokens_of([one], whisper, window, kind)
        torch.testing.assert_close(tokens, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_behind_a_clip_reaches_its_tokens(whisper: Path, kind: str) -> None:
    """Whatever stands there, not even what is no number."""
    built, net = encoder(whisper, "clip"), projector(kind)
    rows = torch.randn(2, MELS, 61, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([61, 37])
    noisy = rows.clone()
    noisy[1, :, 37:] = float("nan")
    with torch.no_grad():
        clean = net(built(rows, lengths), built.valid_rows(lengths))
        dirty = net(built(noisy, lengths), built.valid_rows(lengths))
        # In the full window the encoder hears silence after a clip; what its projector sees there must not matter either.
        features = built(rows, lengths)
        marred = features.clone()
        marred[1, 19:] = float("nan")
        last = net(marred, built.valid_rows(lengths))
    count = row_tokens(AudioSpec(MELS, 100, False, (2, *projector_strides(kind))), MediaMeta(num_frames=37))[0]
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1, :count], dirty[1, :count])
    assert torch.equal(clean[1, :count], last[1, :count])


@pytest.mark.parametrize("kind", KINDS)
def test_every_valid_frame_matters(whisper: Path, kind: str) -> None:
    built, net = encoder(whisper, "clip"), projector(kind)
    rows = torch.randn(1, MELS, 37, requires_grad=True)
    lengths = torch.tensor([37])
    net(built(rows, lengths), built.valid_rows(lengths)).pow(2).sum().backward()
    assert rows.grad is not None and bool(rows.grad.abs().sum((0, 1)).gt(0).all())


def test_the_full_window_and_the_clips_own_are_different_features(whisper: Path) -> None:
    one = [wave(3.54)]
    full, own = (tokens_of(one, whisper, window, "linear")[0] for window in ("full", "clip"))
    assert full.shape == own.shape and (full - own).abs().max() > 1e-3


def test_pairs_are_means_of_valid_rows_alone() -> None:
    rows = torch.arange(1.0, 6.0)[None, :, None].repeat(2, 1, 3)
    found = mean_of_pairs(rows, torch.tensor([5, 3]))
    assert found[..., 0].tolist() == [[1.5, 3.5, 5.0], [1.5, 3.0, 0.0]]
    assert mean_of_pairs(rows, None)[0, :, 0].tolist() == [1.5, 3.5, 5.0]


@pytest.mark.parametrize("seconds", [1.0, 0.4, 0.37])
@pytest.mark.parametrize("together", [False, True])
def test_qwen2_audio_is_read_as_transformers_reads_it(tmp_path: Path, seconds: float, together: bool) -> None:
    """Its encoder, which pools, and its linear projector: features and logits; the last of 19 rows gives none."""
    theirs = save_qwen2_audio(tmp_path, seconds=2)
    spec = spec_of(tmp_path)
    waves = [wave(seconds), wave(2.0)] if together else [wave(seconds)]
    rows, lengths = joined(waves, spec)
    assert spec.strides == (2, 2)
    built, linear = encoder(tmp_path), theirs.model.multi_modal_projector.linear
    mask = (torch.arange(rows.shape[-1]) < lengths[:, None]).long()
    counts = [num_tokens(spec, MediaMeta(num_frames=int(n))) for n in lengths]
    ids = torch.full((len(waves), max(counts) + 2), 7)
    for row, count in zip(ids, counts):
        row[1 : 1 + count] = theirs.config.audio_token_id
    heard: list[Tensor] = []
    hook = theirs.model.multi_modal_projector.register_forward_hook(lambda module, args, output: heard.append(output))
    with torch.no_grad():
        logits = theirs(input_ids=ids, input_features=rows, feature_attention_mask=mask, attention_mask=torch.ones_like(ids)).logits
        hook.remove()
        found = linear(built(rows, lengths))
        embeds = theirs.get_input_embeddings()(ids)
        for row, features, count in zip(embeds, found, counts):
            row[1 : 1 + count] = features[:count]
        ours = theirs.lm_head(theirs.model.language_model(inputs_embeds=embeds).last_hidden_state)
    for features, expected, count in zip(found, heard[0], counts):
        torch.testing.assert_close(features[:count], expected[:count], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5)


def test_encoders_are_found_in_folders_of_every_layout(whisper: Path, tmp_path: Path) -> None:
    rows = torch.randn(1, MELS, 40)
    expected = encoder(whisper, "clip")(rows)
    files = load_file(whisper / "model.safetensors")
    whole = {name: tensor for name, tensor in files.items() if name.startswith("model.encoder.")}
    assert len(whole) < len(files)
    for prefix in ("", "encoder.", "audio_tower."):
        other = tmp_path / f"x{prefix}"
        other.mkdir()
        save_file({prefix + name.removeprefix("model.encoder."): t for name, t in whole.items()}, other / "model.safetensors")
        (other / "config.json").write_text((whisper / "config.json").read_text())
        assert torch.equal(encoder(other, "clip")(rows), expected)
        assert spec_of(other) == spec_of(whisper)


def test_what_a_folder_says_of_its_features_is_believed_or_refused(whisper: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((whisper / "config.json").read_text())
    flat = json.loads((whisper / "preprocessor_config.json").read_text())

    def write(name: str, value: dict[str, Any]) -> None:
        (tmp_path / name).write_text(json.dumps(value))

    write("processor_config.json", {"feature_extractor": {**flat, "hop_length": 320, "chunk_length": 60}})
    assert spec_of(tmp_path).hop == 320
    write("preprocessor_config.json", {**flat, "feature_size": 80})
    with pytest.raises(ConfigError, match=r"feature_size of the feature extractor makes 80, the encoder .* needs 10"):
        spec_of(tmp_path)
    write("preprocessor_config.json", {**flat, "chunk_length": 15})
    with pytest.raises(ConfigError, match=r"chunk_length of the feature extractor makes 240000, the encoder .* needs 480000"):
        spec_of(tmp_path)
    with pytest.raises(ConfigError, match=r"kind = 'resampler' is not 'linear' \| .* \| 'vita_conv' \| 'mlp1x_gelu' \.\.\."):
        spec_of(whisper, kind="resampler")
    write("config.json", {"model_type": "wav2vec2"})
    with pytest.raises(ConfigError, match=r"'wav2vec2' is not whisper \| qwen2_audio_encoder \| whale"):
        spec_of(tmp_path)


def test_prompts_stand_before_every_clip(whisper: Path) -> None:
    spec = spec_of(whisper, "clip", "conv_mlp", prompts=3)
    meta = MediaMeta(num_frames=30)
    assert num_tokens(spec, meta) == 3 + 4
    assert token_rows(spec, meta, 4).tolist() == [-1, -2, -3, 0, 1, 2, 3]
    extra = projector("conv_mlp", prompts=64).get_parameter("extra")
    assert extra.shape == (64, 16) and abs(extra.std().item() - 0.02) < 0.002 and abs(extra.mean().item()) < 0.002


def test_blank_rows_are_as_short_as_they_may_be(whisper: Path) -> None:
    assert row_shape(spec_of(whisper)) == (MELS, 3000) and row_shape(spec_of(whisper, "clip")) == (MELS, 2)


def test_positions_are_constants_and_no_statistics_are_kept(whisper: Path) -> None:
    built = encoder(whisper).requires_grad_(True)
    assert [name for name, p in built.named_parameters() if not p.requires_grad] == ["tower.embed_positions.weight"]
    for kind in KINDS:
        assert not list(projector(kind).named_buffers())
    assert not list(built.named_buffers())
