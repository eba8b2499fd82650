"""Sentence encoders: the torch encoder against transformers, and the loader against bad directories."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, BertModel

from edge_export.checkpoint.bert import load_encoder
from edge_export.model.config import EncoderConfig
from edge_export.model.encoder import Encoder, encoder_tensor_shapes
from edge_reasoner.errors import CheckpointError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "how", "far", "is", "it", "from", "a", "to", "b", "?", "##s"]
SENTENCES = ["How far is it from a to b?", "a", "is it far? how far? as far as from b to a", ""]
CONFIGS = {
    "tiny": {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2},
    "one layer, wide heads": {
        "hidden_size": 48,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "layer_norm_eps": 1e-5,
        "type_vocab_size": 3,
    },
}
MEAN = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}


def make_directory(path, options=None, *, pooling=None, modules=None, head=False):
    """A random BERT saved by transformers, with a WordPiece tokenizer; returns the transformers model."""
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=20, max_position_embeddings=40, initializer_range=0.2, **(options or CONFIGS["tiny"])
    )
    full = (BertForMaskedLM if head else BertModel)(config).eval()
    full.save_pretrained(path)
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path / "tokenizer.json"))
    kinds = modules or (["Transformer", "Pooling", "Normalize"] if pooling else [])
    if kinds:
        folders = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
        listed = [
            {
                "idx": i,
                "name": str(i),
                "path": folders.get(kind, ""),
                "type": f"sentence_transformers.models.{kind}",
            }
            for i, kind in enumerate(kinds)
        ]
        (path / "modules.json").write_text(json.dumps(listed))
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return full.bert if head else full


def batch_of(checkpoint, sentences):
    """(token ids, attention mask) of padded sentences, special tokens included."""
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer.tokenizer_json.decode())
    encoded = [tokenizer.encode(text).ids[: checkpoint.config.context_tokens] for text in sentences]
    width = max(map(len, encoded))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in encoded])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in encoded])
    return ids, mask


def reference_embedding(model, ids, mask, pooling):
    """Pooled and normalized embeddings from transformers' last hidden state."""
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weight = mask[:, :, None].float()
    pooled = hidden[:, 0] if pooling == "cls" else (hidden * weight).sum(1) / weight.sum(1)
    return torch.nn.functional.normalize(pooled, dim=-1)


def assert_same(expected, got):
    """Cosine at least 1 − 1e-6 and no element further off than 1e-4."""
    assert (expected - got).abs().max() <= 1e-4
    assert (expected * got).sum(1).min() >= 1 - 1e-6


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("name", CONFIGS)
def test_random_encoders_agree_with_transformers(tmp_path, name, pooling):
    """Hidden states and embeddings of small random BERTs equal transformers', padded rows included."""
    settings = {"pooling_mode_cls_token": pooling == "cls", "pooling_mode_mean_tokens": pooling == "mean"}
    model = make_directory(tmp_path, CONFIGS[name], pooling=settings)
    checkpoint = load_encoder(tmp_path)
    encoder = Encoder.from_source(checkpoint.config, checkpoint.source)
    ids, mask = batch_of(checkpoint, SENTENCES)
    assert checkpoint.config.pooling == pooling
    with torch.no_grad():
        assert_same(reference_embedding(model, ids, mask, pooling), encoder(ids, mask))
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        assert (encoder.hidden_states(ids, mask)[mask.bool()] - hidden).abs().max() <= 1e-4


def test_plain_directory_pools_by_the_mean(tmp_path):
    """Without modules.json the mean is taken, every position counts, and a head's prefix is found."""
    model = make_directory(tmp_path, head=True)
    checkpoint = load_encoder(tmp_path)
    assert (checkpoint.config.pooling, checkpoint.config.context_tokens) == ("mean", 40)
    ids, mask = batch_of(checkpoint, SENTENCES)
    with torch.no_grad():
        got = Encoder.from_source(checkpoint.config, checkpoint.source)(ids, mask)
    assert_same(reference_embedding(model, ids, mask, "mean"), got)


def test_new_pooling_spelling_and_shorter_context(tmp_path):
    """sentence-transformers 5's `pooling_mode` is read; max_seq_length cuts the position table."""
    make_directory(tmp_path, pooling={"embedding_dimension": 32, "pooling_mode": "cls"})
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 16, "do_lower_case": false}')
    checkpoint = load_encoder(tmp_path)
    assert (checkpoint.config.pooling, checkpoint.config.context_tokens) == ("cls", 16)
    assert checkpoint.source.shape("embed.position.weight") == (16, 32)
    assert checkpoint.source.get("embed.position.weight").shape == (16, 32)
    assert Encoder.from_source(checkpoint.config, checkpoint.source)(
        *batch_of(checkpoint, ["a b"])
    ).shape == (1, 32)


def test_checkpoint_facts(tmp_path):
    """Names, parameters, digest and a tokenizer that neither truncates nor pads."""
    make_directory(tmp_path, pooling=MEAN)
    checkpoint = load_encoder(tmp_path)
    assert list(checkpoint.source.names()) == list(encoder_tensor_shapes(checkpoint.config))
    encoder = Encoder.from_source(checkpoint.config, checkpoint.source)
    assert checkpoint.parameters == sum(p.numel() for p in encoder.parameters())
    weights = (tmp_path / "model.safetensors").read_bytes()
    assert checkpoint.digest.sha256 == hashlib.sha256(weights).hexdigest()
    assert checkpoint.digest.size_bytes == len(weights)
    ids, _ = batch_of(checkpoint, ["far " * 20])
    assert ids.shape == (1, 22)
    assert not encoder.training


def test_padding_changes_nothing():
    """An embedding does not depend on how far its row is padded, and its length is one."""
    torch.manual_seed(3)
    config = EncoderConfig("bert", 20, 32, 2, 4, 64, 1e-12, 40, 2, "mean")
    encoder = Encoder(config).eval()
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    padded = torch.cat([ids, torch.full((1, 9), 11)], dim=1)
    mask = (torch.arange(14) < 5).long()[None]
    with torch.no_grad():
        short, long = encoder(ids, torch.ones_like(ids)), encoder(padded, mask)
    assert torch.allclose(short, long, atol=1e-6)
    assert torch.allclose(short.norm(dim=1), torch.ones(1))


@pytest.mark.real_model
def test_minilm_agrees_with_transformers(minilm_dir):
    """The real all-MiniLM-L6-v2: cosine ≥ 1 − 1e-6 and 1e-4 to transformers on padded questions."""
    checkpoint = load_encoder(minilm_dir)
    config = checkpoint.config
    assert (config.hidden_size, config.num_layers, config.pooling, config.context_tokens) == (
        384,
        6,
        "mean",
        256,
    )
    texts = [
        "How far is it from A to B?",
        "小明有十五个苹果",
        "What is 2+2?",
        "word " * 300,
        "naïve café 🙂",
        "",
    ]
    ids, mask = batch_of(checkpoint, texts)
    assert ids.shape == (6, 256)
    model = BertModel.from_pretrained(minilm_dir).eval()
    with torch.no_grad():
        got = Encoder.from_source(config, checkpoint.source)(ids, mask)
    assert_same(reference_embedding(model, ids, mask, "mean"), got)


def edit(path, **changes):
    """Changes fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BAD_CONFIGS = {
    "activation": ({"hidden_act": "relu"}, "hidden_act is 'relu'; allowed is 'gelu'"),
    "relative positions": ({"position_embedding_type": "relative_key"}, "allowed is 'absolute'"),
    "family": ({"model_type": "roberta"}, "model_type is 'roberta'; allowed is 'bert'"),
    "decoder": ({"is_decoder": True}, "is_decoder is 'True'"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "heads": ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of 5 heads"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "too many layers": ({"num_hidden_layers": 3}, "'encoder.layer.2.attention.self.query.weight'"),
    "other width": ({"intermediate_size": 65}, "has shape [64, 32]"),
    "width is text": ({"hidden_size": "32"}, "hidden_size"),
    "vocabulary": ({"vocab_size": 19}, "shape [20, 32]"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config(tmp_path, case):
    """A config.json that is unsupported or contradicts the weights is refused in one line."""
    make_directory(tmp_path)
    changes, message = BAD_CONFIGS[case]
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError) as caught:
        load_encoder(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


BAD_MODULES = {
    "dense": (MEAN, ["Transformer", "Pooling", "Dense"], "module 'Dense' is not supported"),
    "no pooling": (MEAN, ["Transformer"], "must list a Transformer and a Pooling"),
    "max pooling": ({"pooling_mode_max_tokens": True}, None, "pooling ['max_tokens'] is not supported"),
    "two poolings": ({"pooling_mode": ["cls", "mean"]}, None, "allowed: mean or cls"),
    "none": ({"pooling_mode_mean_tokens": False}, None, "allowed: mean or cls"),
}


@pytest.mark.parametrize("case", BAD_MODULES)
def test_bad_modules(tmp_path, case):
    """Modules and poolings that change the embedding in other ways are refused, not ignored."""
    pooling, modules, message = BAD_MODULES[case]
    make_directory(tmp_path, pooling=pooling, modules=modules)
    with pytest.raises(CheckpointError) as caught:
        load_encoder(tmp_path)
    assert message in str(caught.value)


def test_hostile_paths_and_damage(tmp_path):
    """Module paths outside the directory, truncated weights and missing files end in CheckpointError."""
    make_directory(tmp_path, pooling=MEAN)
    listed = json.loads((tmp_path / "modules.json").read_text())
    for path in ("../elsewhere", "/etc", "..", "a/b"):
        listed[1]["path"] = path
        (tmp_path / "modules.json").write_text(json.dumps(listed))
        with pytest.raises(CheckpointError, match="must be a folder beside it"):
            load_encoder(tmp_path)
    (tmp_path / "modules.json").unlink()
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_encoder(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match="no weights found"):
        load_encoder(tmp_path)
    with pytest.raises(CheckpointError, match="an encoder is a directory"):
        load_encoder(tmp_path / "missing")


def test_tokenizer_must_fit(tmp_path):
    """A tokenizer with more tokens than the model embeds is refused."""
    make_directory(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_tokens([f"extra{i}" for i in range(7)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="has 21 tokens; the model embeds 20"):
        load_encoder(tmp_path)


def test_a_link_to_nothing_is_not_another_pooling(tmp_path):
    """Without modules.json the mean is taken; a download that lacks the file must not be taken for that."""
    make_directory(tmp_path)
    (tmp_path / "modules.json").unlink(missing_ok=True)
    (tmp_path / "modules.json").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"modules\.json: cannot be read"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompts": {"q": "query: "}, "default_prompt_name": "q"}', "has a default prompt"),
        ("{", "left aside"),
    ],
)
def test_a_default_prompt_is_a_warning(text, message, tmp_path):
    """sentence-transformers would put it before every sentence; what is not known is named."""
    make_directory(tmp_path)
    assert load_encoder(tmp_path).warnings == ()
    (tmp_path / "config_sentence_transformers.json").write_text(text)
    assert message in load_encoder(tmp_path).warnings[0]
