"""Where models come from: the cache of the hub, GGUF files, and what is said where there is nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from tests.tiny import tiny_model, tiny_model_folder, tiny_tokenizer

from fedloom.client import bundled
from fedloom.client.models import Model, load_model, load_tokenizer
from fedloom.home import BUNDLED, Bundled
from fedloom.types import ModelError


def cpu(name: Path | str) -> Model:
    return Model(name=str(name), dtype="fp32", device="cpu")


def test_unreachable_hub_names_every_way_to_provide_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(Bundled, "file", lambda self: None)
    for name in ("smollm2-135m", "smollm2-135", "org/name"):
        with pytest.raises(ModelError) as caught:
            load_model(cpu(name))
        for way in (BUNDLED["smollm2-135m"].command, "model=FOLDER", "model=FILE.gguf", "HF_HOME=", "a network"):
            assert way in str(caught.value)
        assert ("did you mean 'smollm2-135m'" in str(caught.value)) == (name == "smollm2-135")
        assert "HF_HUB_OFFLINE is set" in str(caught.value)


def test_cached_hub_model_is_loaded_and_its_commit_kept(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(Bundled, "file", lambda self: None)
    commit, repository = "0123456789" * 4, tmp_path / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_folder, repository / "snapshots" / commit)
    loaded = load_model(cpu("smollm2-135m"))
    assert loaded.spec.revision == commit
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in loaded.source
    assert load_model(loaded.spec).spec == loaded.spec


def write_gguf(file: Path) -> None:
    """Write `tiny_model` and its tokenizer, with one merge as the format wants some, as llama.cpp would."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(272)
    names = [*tokenizer.convert_ids_to_tokens(range(259)), "ab", *(f"<unused{i}>" for i in range(12))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_types([3] * 3 + [1] * 257 + [5] * 12)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names_of = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.named_parameters():
        values = tensor.detach().numpy()
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
        if heads:  # llama.cpp rotates adjacent pairs
            values = values.reshape(heads, 2, -1, 32).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names_of.get_name(name, (".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLOOM_HOME", str(tmp_path / "home"))
    write_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def kept(gguf_file: Path) -> list[str]:
    return [folder.name for folder in (gguf_file.parent / "home" / "models").iterdir()]


def test_gguf_is_converted_once_into_a_plain_model(gguf_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    first = load_model(cpu(gguf_file), told.append)
    again = load_model(cpu(gguf_file), told.append)
    assert [line.split()[:2] for line in told] == [["converting", "tiny.gguf"]]
    wanted = tiny_model().state_dict()
    for loaded in (first, again):
        assert all(torch.equal(wanted[name], tensor) for name, tensor in loaded.model.state_dict().items())
        assert not hasattr(loaded.model.config, "quantization_config")
    assert first.tokenizer("Hi <|im_end|>\n")["input_ids"] == tiny_tokenizer()("Hi <|im_end|>\n")["input_ids"]
    assert capfd.readouterr() == ("", "")


def test_other_bytes_are_another_conversion(gguf_file: Path) -> None:
    load_tokenizer(cpu(gguf_file))
    gguf_file.write_bytes(gguf_file.read_bytes()[:-4] + b"\0\0\0\1")
    load_tokenizer(cpu(gguf_file))
    assert len(kept(gguf_file)) == 2


def test_of_two_processes_at_once_both_get_the_model(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = bundled._convert

    def convert_after_another_process(file: Path, folder: Path) -> None:
        monkeypatch.setattr(bundled, "_convert", convert)
        load_tokenizer(cpu(gguf_file))
        convert(file, folder)

    monkeypatch.setattr(bundled, "_convert", convert_after_another_process)
    assert load_model(cpu(gguf_file)).parameters == load_model(cpu(gguf_file)).parameters
    assert len(kept(gguf_file)) == 1


def test_a_conversion_that_fails_leaves_nothing(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Path, folder: Path) -> None:
        tiny_model_folder(folder)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(bundled, "_convert", fail)
        with pytest.raises(ModelError, match=r"No space left.*FEDLOOM_HOME"):
            load_model(cpu(gguf_file))
    assert kept(gguf_file) == []
    load_model(cpu(gguf_file))


def test_leftovers_of_killed_conversions_go_after_a_day(gguf_file: Path) -> None:
    home = gguf_file.parent / "home" / "models"
    (home / ".partial-old").mkdir(parents=True)
    os.utime(home / ".partial-old", (0, 0))
    (home / ".partial-new").mkdir()
    load_tokenizer(cpu(gguf_file))
    assert not (home / ".partial-old").exists()
    assert (home / ".partial-new").exists()


@pytest.mark.parametrize(("content", "said"), [(b"GGUF\3\0", "cannot be converted"), (b"\x80\2", "nor a GGUF file")])
def test_damaged_gguf_is_said(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=f"bad.gguf.*{said}"):
        load_model(cpu(tmp_path / "bad.gguf"))
