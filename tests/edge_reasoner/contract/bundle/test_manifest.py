"""The manifest's schema: what belongs to a component, and what is said of another version's manifest."""

from __future__ import annotations

import json
import shlex

import pytest
from support import tiny_bundle
from support.tiny_graphs import VOCAB, reference_logits, weights

from edge_reasoner.contract.bundle.manifest import parse_manifest, to_canonical_json
from edge_reasoner.contract.bundle.open import open_bundle
from edge_reasoner.errors import BundleError

#: a manifest as the first version of this project wrote it, without what its reader does not look at
SCHEMA_1 = {
    "bundle_id": "0" * 64,
    "components": [{"files": [], "kind": "reasoner"}],
    "licence": "apache-2.0",
    "plan": {"recipe": "int8", "units": []},
    "profile": "raspberry-pi-5",
    "schema_version": 1,
    "source": {"format": "gguf", "name": "SmolLM2-135M-Instruct.Q4_1"},
    "version": 1,
}


@pytest.fixture
def bundle(tmp_path):
    """A tiny bundle with both kinds of components."""
    logits = reference_logits(weights(), list(tiny_bundle.TOKENS))
    assert logits.shape[1] == VOCAB
    return tiny_bundle.write_bundle(tmp_path / "bundle", tiny_bundle.decoder_golden(logits, 1.0))


def refused(document: object) -> str:
    """The one line with which it is refused."""
    with pytest.raises(BundleError) as caught:
        parse_manifest(json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_older_bundle_says_how_to_make_it_again(tmp_path):
    """Schema 1 is refused with the command that exports the same model again, opened or parsed."""
    message = refused(SCHEMA_1)
    assert message.endswith(
        "export the model again: "
        "edge-export SmolLM2-135M-Instruct.Q4_1 --profile raspberry-pi-5 --recipe int8"
    )
    assert "schema_version 1" in message and "reads 2" in message
    (tmp_path / "manifest.json").write_text(json.dumps(SCHEMA_1))
    with pytest.raises(BundleError, match="export the model again"):
        open_bundle(tmp_path)


def test_the_older_bundles_choices_are_named():
    """A preprocessor is asked for where there was one; the default recipe needs no word."""
    both = [{"kind": "reasoner"}, {"kind": "preprocessor"}]
    message = refused({**SCHEMA_1, "components": both, "plan": {"recipe": "auto"}})
    assert message.endswith("--profile raspberry-pi-5 --preprocessor ENCODER")
    assert "--preprocessor" not in refused({**SCHEMA_1, "components": both[1:]})


@pytest.mark.parametrize(
    "name", ["$(reboot)", "a; rm -rf b", "x\u001b[31m\n--out /etc", "'", "", "\u202egnp", "n" * 10_000]
)
def test_a_strangers_name_is_one_harmless_word(name):
    """What an old manifest names reaches neither a shell nor a terminal as anything but one short word."""
    message = refused({**SCHEMA_1, "source": {"name": name}})
    words = shlex.split(message.partition("again: ")[2])
    assert words[0] == "edge-export" and words[2] == "--profile" and len(words) == 6
    assert len(message) < 400 and message.isprintable()


@pytest.mark.parametrize("version", [0, -1, 3, 2**62])
def test_unknown_versions(version):
    """A version that never was, or is not yet, is named."""
    assert f"schema_version {version} is unknown" in refused({**SCHEMA_1, "schema_version": version})


@pytest.mark.parametrize("damage", [{"source": 7}, {"plan": []}, {"components": "x"}, {"profile": None}])
def test_a_damaged_older_manifest_still_says_what_it_is(damage):
    """Where the old fields cannot be read, the command is named without them."""
    assert refused({**SCHEMA_1, **damage}).endswith("edge-export MODEL --profile BOARD")


def test_fields_of_schema_1_are_not_fields_of_the_bundle(bundle):
    """Source, licence, tools and plan belong to a component; a bundle that has them is refused."""
    for name, value in (("licence", "x"), ("tools", {}), ("plan", {}), ("predicted", None)):
        document = json.loads((bundle / "manifest.json").read_bytes())
        assert name in refused({**document, name: value})


def test_components_name_the_model(bundle):
    """The bundle's model is its reasoner; without one, the first component; a report is the bundle's."""
    opened = open_bundle(bundle)
    assert opened.manifest.model == "tiny"
    assert {part.name for part in opened.manifest.components} == {"tiny"}
    (bundle / "report.html").write_bytes(b"<html>")
    document = json.loads((bundle / "manifest.json").read_bytes())
    tiny_bundle.reseal(
        bundle,
        lambda plain: (
            plain.update(files=[{"path": "report.html", "size_bytes": 6, "sha256": "0" * 64}]),
            plain["components"].pop(0),
            plain["components"][0].update(name="encoder-x"),
        ),
    )
    manifest = parse_manifest((bundle / "manifest.json").read_bytes())
    assert manifest.model == "encoder-x" and manifest.entries[-1].path == "report.html"
    assert len(manifest.entries) == len(document["components"][1]["files"]) + 1
    assert parse_manifest(to_canonical_json(manifest)) == manifest
