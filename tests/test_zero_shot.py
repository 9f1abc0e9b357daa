"""Zero-shot heads, judged by open_clip's own classifier and by transformers' own forward pass."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from parity import openclip
from PIL import Image
from references import stirred
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from cli import cli
from features import backbones
from features.backbones import load_backbone, text_open_clip, text_transformers
from features.backbones.known import Known
from features.datasets import Options, open_dataset
from features.errors import BackboneError, ProbeError
from features.extract import extract
from features.plan import ExtractionSettings
from features.store import FeatureStore
from probe.heads import Head
from probe.probing import ProbeOptions
from probe.results import load
from probe.sweep import probe
from probe.zero_shot import Asked, zero_shot

CLASSES = ("dark", "mid", "pale")
TEMPLATES = ["a photo of {}.", "a {} image", "{}"]
VIT = {"layers": 2, "width": 48, "head_width": 16, "patch_size": 16, "image_size": 64}
WORDS = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
COCA = {
    "multimodal_cfg": WORDS,
    "text_cfg": WORDS | {"embed_cls": True, "output_tokens": True},
    "custom_text": True,
}
TOWERS = {  # more of open_clip's model_cfg
    "CLIP": {"text_cfg": WORDS},
    "CLIP, QuickGELU": {"text_cfg": WORDS, "quick_gelu": True},
    "text apart": {"text_cfg": WORDS | {"pool_type": "last"}, "custom_text": True},
    "SigLIP": {
        "text_cfg": WORDS | {"no_causal_mask": True, "proj_bias": True},
        "custom_text": True,
        "init_logit_bias": -10,
    },
    "CoCa": COCA,
}


OPTIONS = ProbeOptions(head="zero-shot", bootstrap=100)


def made(tmp_path, *, findings=False):
    """36 images of 64 pixels, the three classes one a third brighter than the other."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir(exist_ok=True)
    lines = ["path,split,label"]
    for i in range(36):
        pixels = rng.integers(0, 96, (64, 64, 3)) + 70 * (i % 3)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        some = "|".join(c for c in CLASSES if rng.random() < 0.5)
        label = some if findings else CLASSES[i % 3]
        lines.append(f"{i}.png,{'test' if i < 18 else 'train'},{label}")
    table = folder / f"{'findings' if findings else 'classes'}.csv"
    table.write_text("\n".join(lines) + "\n")
    return open_dataset(f"csv:{table}", Options(label_sep="|" if findings else None))


def extracted(tmp_path, name, weights=None, *, findings=False, **how):
    backbone = load_backbone(name, weights)
    settings = ExtractionSettings(precision="float32", exact=True, **how)
    manifest = made(tmp_path, findings=findings)
    [report] = extract(manifest, [backbone], out=tmp_path / "features", settings=settings)
    return report.store


def written(tmp_path, text=None):
    path = tmp_path / "prompts.txt"
    path.write_text(text or "\n".join([*TEMPLATES, *(f"{c}: {c}" for c in CLASSES)]))
    return path


def head_of(store, prompts, weights=None, feature=None):
    with FeatureStore.open(store) as opened:
        found = zero_shot(opened, opened.manifest(), Asked(prompts, weights), feature)
        X = torch.from_numpy(opened.read(found.feature, np.arange(36)))
        return found, X


def of_open_clip(tmp_path, kind="CLIP"):
    """A folder of a small model, its model with moved weights, its tokenizer and its name."""
    import open_clip

    openclip(VIT, {}, tmp_path, **TOWERS[kind])
    name = f"local-dir:{tmp_path}"
    return open_clip.create_model(name).eval(), open_clip.get_tokenizer(name), f"openclip:{name}"


def of_transformers(folder, kind="CLIP"):
    """A folder of a small two-tower model with a tokenizer of words, and the model."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {w: i for i, w in enumerate(["<pad>", "<unk>", "</s>", "a", "photo", "of", *CLASSES])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>",
        model_input_names=["input_ids"] + ["attention_mask"] * (kind == "CLIP"),
    ).save_pretrained(folder)  # fmt: skip
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 96}
    text = {"vocab_size": 10, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    text |= sizes | {"max_position_embeddings": 12}
    config = getattr(transformers, f"{kind}Config")(
        vision_config=sizes | {"image_size": 64, "patch_size": 16}, text_config=text
    )
    torch.manual_seed(0)
    stirred(getattr(transformers, f"{kind}Model")(config)).save_pretrained(folder)
    side = {"height": 64, "width": 64}
    processor = getattr(transformers, f"{kind}ImageProcessor")
    processor(size=side, do_center_crop=False).save_pretrained(folder)
    return transformers.AutoModel.from_pretrained(folder).eval()


# --- the head is what the libraries compute -------------------------------------------------------


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_weights_and_logits_are_open_clip_s(tmp_path, kind):
    from open_clip import build_zero_shot_classifier

    model, tokenizer, name = of_open_clip(tmp_path, kind)
    found, X = head_of(extracted(tmp_path, name), written(tmp_path))
    W = build_zero_shot_classifier(model, tokenizer, CLASSES, TEMPLATES)  # (D, K)
    assert W.std() > 0.01 and (W[:, 0] - W[:, 1]).abs().max() > 1e-3
    ours = found.head.coef / found.scale
    assert (ours - W.T.double()).abs().max() < 1e-6
    bias = 0 if model.logit_bias is None else model.logit_bias
    logits = model.logit_scale.exp() * normalize(X, dim=-1) @ W + bias
    mine = normalize(X.double(), dim=-1) @ found.head.coef.T + found.head.intercept
    assert (mine - logits).abs().max() < 1e-4
    assert (found.bias is None) == (model.logit_bias is None)
    assert (found.head.predict_proba(X) - logits.softmax(-1)).abs().max() < 1e-5


@torch.no_grad()
def test_a_text_tower_of_transformers_within_open_clip_is_loaded_with_its_tokenizer(tmp_path):
    """As BiomedCLIP's: the tower's configuration from one place, the tokenizer beside the model."""
    import open_clip
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "image", *CLASSES]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertConfig(**sizes, intermediate_size=64, vocab_size=len(words))
    transformers.BertModel(bert).save_pretrained(tmp_path / "bert")
    text = {"hf_model_name": str(tmp_path / "bert"), "hf_tokenizer_name": "medprobe/none"}
    text |= {"hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler"}
    openclip(VIT, {}, tmp_path, text_cfg={**text, "context_length": 12})
    name = f"local-dir:{tmp_path}"
    model, tokenizer = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    found, _ = head_of(extracted(tmp_path, f"openclip:{name}"), written(tmp_path))
    W = open_clip.build_zero_shot_classifier(model, tokenizer, CLASSES, TEMPLATES)
    assert (found.head.coef / found.scale - W.T).abs().max() < 1e-6
    assert (W[:, 0] - W[:, 1]).abs().max() > 1e-3
    shutil.rmtree(tmp_path / "bert")
    with pytest.raises(BackboneError, match="text tower's configuration is of .*bert: fetch it"):
        text_open_clip.load_any(name, None)


@torch.no_grad()
def test_several_prompts_of_a_class_are_averaged_with_the_templates(tmp_path):
    model, tokenizer, name = of_open_clip(tmp_path)
    lines = ["a photo of {}", "{}", "dark: night | black", "mid: grey", "pale: white | snow|ice"]
    found, _ = head_of(extracted(tmp_path, name), written(tmp_path, "\n".join(lines)))
    for w, words in zip(found.head.coef, (["night", "black"], ["grey"], ["white", "snow", "ice"]),
                        strict=True):  # fmt: skip
        texts = [f"{t}{word}" for word in words for t in ("a photo of ", "")]
        mean = model.encode_text(tokenizer(texts), normalize=True).mean(0)
        assert (w / found.scale - mean / mean.norm()).abs().max() < 1e-6
    [kept] = [e for t, e in zip(found.prompts.texts(), found.embeddings, strict=True) if t == "ice"]
    assert (kept - model.encode_text(tokenizer(["ice"]), normalize=True)[0]).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
@torch.no_grad()
def test_logits_are_those_of_transformers_own_forward_pass(tmp_path, kind):
    from transformers import AutoImageProcessor, AutoTokenizer

    model = of_transformers(tmp_path, kind)
    store = extracted(tmp_path, f"hf:{tmp_path}")
    prompts = written(tmp_path, "\n".join(["a photo of {}", *(f"{c}: {c}" for c in CLASSES)]))
    found, X = head_of(store, prompts)
    with FeatureStore.open(store) as opened:
        manifest = opened.manifest()
    images = [Image.open(Path(manifest.root, path)) for path in manifest.path]
    pixels = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(
        images, return_tensors="pt"
    )
    padding = {"padding": "max_length", "max_length": 12} if kind == "Siglip" else {"padding": True}
    texts = [f"a photo of {c}" for c in CLASSES]
    tokens = AutoTokenizer.from_pretrained(tmp_path)(texts, return_tensors="pt", **padding)
    theirs = model(**tokens, **pixels).logits_per_image
    mine = normalize(X.double(), dim=-1) @ found.head.coef.T + found.head.intercept
    assert (mine - theirs).abs().max() < 2e-4 * theirs.abs().max()
    assert (found.bias is not None) == (kind == "Siglip")
    assert theirs.std(0).min() > 1e-3


@torch.no_grad()
def test_the_study_s_openclip_reads_the_text_tower_of_its_whole_file(tmp_path, monkeypatch):
    import open_clip
    from open_clip import build_zero_shot_classifier, get_tokenizer

    architecture = "ViT-S-32-alt"  # small, of the same layout
    spec = replace(backbones.BACKBONES["openclip"], architecture=architecture, patch=32)
    monkeypatch.setitem(backbones.BACKBONES, "openclip", spec)
    torch.manual_seed(0)
    model = stirred(open_clip.create_model(architecture, load_weights=False))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "whole.pt")
    torch.save(model.visual.state_dict(), tmp_path / "visual.pt")
    store = extracted(tmp_path, "openclip", str(tmp_path / "whole.pt"))
    prompts = written(tmp_path)
    found, _ = head_of(store, prompts, str(tmp_path / "whole.pt"))
    assert found.feature == "final/proj"
    W = build_zero_shot_classifier(model, get_tokenizer(architecture), CLASSES, TEMPLATES)
    assert (found.head.coef / found.scale - W.T).abs().max() < 1e-6
    with pytest.raises(BackboneError, match=r"visual\.pt hold no text tower: those that have one"):
        head_of(store, prompts, str(tmp_path / "visual.pt"))
    with pytest.raises(ProbeError, match="made with weights of a file: name it by --weights"):
        head_of(store, prompts)


@torch.no_grad()
def test_a_backbone_by_the_name_that_people_use_has_the_text_tower_of_its_route(
    tmp_path, monkeypatch
):
    for kind, name in (("openclip", "mine"), ("hf", "yours")):
        (tmp_path / kind).mkdir()
        row = Known(name, f"{kind}:nowhere/at-all", ("xray",), "MIT", "made up")
        monkeypatch.setitem(backbones.KNOWN, name, row)
    _, _, long = of_open_clip(tmp_path / "openclip")
    of_transformers(tmp_path / "hf")
    prompts = written(tmp_path)
    for kind, name in (("openclip", "mine"), ("hf", "yours")):
        folder = str(tmp_path / kind)
        by_name, _ = head_of(extracted(tmp_path, name, folder), prompts, folder)
        route = long if kind == "openclip" else f"hf:{folder}"
        by_route, _ = head_of(extracted(tmp_path, route), prompts)
        assert torch.equal(by_name.head.coef, by_route.head.coef)


@torch.no_grad()
def test_findings_weigh_the_positive_prompt_against_the_negative(tmp_path):
    model, tokenizer, name = of_open_clip(tmp_path)
    store = extracted(tmp_path, name, findings=True)
    lines = ["a photo of {}", *(f"{c}: {c} | no {c}" for c in CLASSES)]
    found, X = head_of(store, written(tmp_path, "\n".join(lines)))
    for k, name in enumerate(CLASSES):
        texts = tokenizer([f"a photo of {name}", f"a photo of no {name}"])
        w = model.encode_text(texts, normalize=True)
        p = (model.logit_scale.exp() * normalize(X, dim=-1) @ w.T).softmax(-1)[:, 0]
        assert (found.head.predict_proba(X)[:, k] - p).abs().max() < 1e-5
    with pytest.raises(ProbeError, match=r"^dark: want `finding: positive \| negative` of this"):
        head_of(store, written(tmp_path, "dark: dark\nmid: a | b\npale: c | d"))
    result = probe(store, out=tmp_path / "out", settings=OPTIONS,
                   text=Asked(written(tmp_path, "\n".join(lines))))  # fmt: skip
    assert result.task == "multilabel" and set(result.thresholds["outputs"]) == set(CLASSES)


@torch.no_grad()
def test_a_finding_without_a_negative_prompt_is_siglip_s_own_sigmoid(tmp_path):
    model = of_transformers(tmp_path, "Siglip")
    store = extracted(tmp_path, f"hf:{tmp_path}", findings=True)
    found, X = head_of(store, written(tmp_path, "dark: dark\nmid: mid\npale: pale | a photo"))
    tokens = found.prompts.texts()
    assert tokens == ("dark", "mid", "pale", "a photo")
    logits = normalize(X, dim=-1) @ found.embeddings.T * model.logit_scale.exp() + model.logit_bias
    p = found.head.predict_proba(X)
    assert (p[:, :2] - logits[:, :2].sigmoid()).abs().max() < 1e-6
    assert (p[:, 2] - logits[:, 2:].softmax(-1)[:, 0]).abs().max() < 1e-6


# --- a result as any other ------------------------------------------------------------------------


def call(*words):
    return CliRunner().invoke(cli, [str(word) for word in words])


def test_a_zero_shot_result_goes_through_predict_compare_and_report(tmp_path):
    _, _, name = of_open_clip(tmp_path, "SigLIP")
    store, out, prompts = extracted(tmp_path, name), tmp_path / "out", written(tmp_path)
    zero = ("probe", store, "-o", out, "--head", "zero-shot", "--prompts", prompts)
    done = call(*zero, "--bootstrap", 200)
    assert done.exit_code == 0, done.output
    assert "on 18 test images, nothing trained" in done.stdout
    [result] = load(out)
    assert result.head == result.protocol == "zero-shot"
    assert result.scenario == "frozen-zero-shot" and result.feature == "final/pooled"
    assert (result.C, result.n_train, result.n_test) == (None, 0, 18)
    assert set(result.settings) == {"prompts", "text_tower", "tokens"}
    assert all(result.metrics[m]["ci_low"] is not None for m in ("auroc", "accuracy"))
    folder = (out / result.heads).parent
    head, _ = Head.load(folder / "heads.json")
    with FeatureStore.open(store) as opened:
        manifest = opened.manifest()
        z = head.log_odds(torch.from_numpy(opened.read("final/pooled", np.arange(36))))
    rows = list(csv.DictReader((folder / "predictions.csv").read_text().splitlines()))
    test = manifest.split == "test"
    for k, c in enumerate(CLASSES):
        there = [float(row[f"log_odds:{c}"]) for row in rows]
        assert np.abs(np.array(there) - z[:, k].numpy()[test]).max() < 1e-9
    about = json.loads((folder / "prompts.json").read_text())
    kept = load_file(folder / "prompts.safetensors")["embeddings"]
    assert about["texts"][0] == "a photo of dark." and len(kept) == len(about["texts"]) == 9
    assert about["digest"] == result.settings["prompts"]
    applied = call("predict", folder, store)
    assert applied.exit_code == 0, applied.output
    said = {row["id"]: row for row in csv.DictReader(applied.stdout.splitlines())}
    assert [said[row["id"]]["p:mid"] for row in rows] == [row["p:mid"] for row in rows]
    one = call("predict", folder, tmp_path / "images" / "5.png")
    assert one.exit_code == 0, one.output
    assert call("probe", store, "-o", out, "--C", "1", "--bootstrap", 200).exit_code == 0
    against = call("compare", out, "--json")
    assert against.exit_code == 0, against.output
    assert "zero-shot" in against.stdout
    page = call("report", out, "-o", tmp_path / "page")
    assert page.exit_code == 0, page.output
    assert "frozen, zero-shot" in (tmp_path / "page" / "index.html").read_text() or any(
        "zero-shot" in file.read_text() for file in (tmp_path / "page").rglob("*.html")
    )


def test_prompts_are_part_of_a_result_s_identity_and_how_they_are_written_is_not(tmp_path):
    _, _, name = of_open_clip(tmp_path)
    store = extracted(tmp_path, name)
    texts = ["dark: a\nmid: b\npale: c", "# as before\npale: c\nmid: b\ndark: 'a'"]
    texts.append("dark: a\nmid: b\npale: d")
    digests = [
        probe(
            store,
            out=tmp_path / "out",
            settings=OPTIONS,
            text=Asked(written(tmp_path, text)),
        ).identity.digest
        for text in texts
    ]
    assert digests[0] == digests[1] != digests[2]
    assert len(load(tmp_path / "out")) == 2


def moved(file, key):
    """Change one tensor of a file of weights."""
    state = load_file(file)
    state[key] = state[key] + 0.01
    save_file(state, file, {"format": "pt"})


def edited(file, change):
    about = json.loads(file.read_text())
    change(about)
    file.write_text(json.dumps(about))


def other_word(folder):
    edited(folder / "tokenizer.json", lambda t: t["model"]["vocab"].update(dark=7, mid=6))


def other_activation(folder):
    edited(folder / "config.json", lambda c: c["text_config"].update(hidden_act="gelu"))


TEXT_CHANGES = {  # changes of a text tower: the images' features stay
    "hf, projection": ("hf", lambda f: moved(f / "model.safetensors", "text_projection.weight")),
    "hf, inner": ("hf", lambda f: moved(
        f / "model.safetensors", "text_model.encoder.layers.0.mlp.fc1.weight")),
    "hf, configuration": ("hf", other_activation),
    "hf, tokenizer": ("hf", other_word),
    "openclip, projection": ("openclip", lambda f: moved(
        f / "open_clip_model.safetensors", "text_projection")),
    "openclip, inner": ("openclip", lambda f: moved(
        f / "open_clip_model.safetensors", "transformer.resblocks.0.mlp.c_fc.weight")),
    "openclip, configuration": ("openclip", lambda f: edited(
        f / "open_clip_config.json",
        lambda c: c["model_cfg"]["text_cfg"].update(no_causal_mask=True))),
}  # fmt: skip


@pytest.mark.parametrize("kind", TEXT_CHANGES)
def test_the_text_tower_is_part_of_a_result_s_identity_and_its_folder_is_not(tmp_path, kind):
    """The image tower, the prompts and the store stay as they are."""
    library, change = TEXT_CHANGES[kind]
    folder, out = tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    name = f"hf:{folder}"
    if library == "hf":
        of_transformers(folder)
    else:
        _, _, name = of_open_clip(folder)
    store, prompts = extracted(tmp_path, name), written(tmp_path)
    text = Asked(prompts)
    first, again = (probe(store, out=out, settings=OPTIONS, text=text) for _ in range(2))
    assert first.identity.digest == again.identity.digest
    assert len(load(out)) == 1
    change(folder)
    other = probe(store, out=out, settings=OPTIONS, text=text)
    assert other.identity.digest != first.identity.digest
    assert {one.identity.digest for one in load(out)} == {
        first.identity.digest, other.identity.digest
    }  # fmt: skip
    assert other.settings["prompts"] == first.settings["prompts"]


def test_a_configuration_of_the_image_tower_that_has_changed_is_refused(tmp_path):
    of_transformers(tmp_path)
    store, prompts = extracted(tmp_path, f"hf:{tmp_path}"), written(tmp_path)
    head_of(store, prompts)
    edited(tmp_path / "config.json", lambda about: about["vision_config"].update(hidden_act="gelu"))
    with pytest.raises(BackboneError, match="its configuration is no longer that of the features"):
        head_of(store, prompts)


def test_two_classes_have_a_threshold_of_images_that_trained_nothing(tmp_path):
    _, _, name = of_open_clip(tmp_path)
    table = tmp_path / "images" / "classes.csv"
    made(tmp_path)
    table.write_text(table.read_text().replace(",mid", ",dark"))
    [report] = extract(open_dataset(f"csv:{table}"), [load_backbone(name)], out=tmp_path / "two")
    done = call("probe", report.store, "-o", tmp_path / "out", "--protocol", "zero-shot", "--json",
                "--prompts", written(tmp_path, "dark: a\npale: c"))  # fmt: skip
    [result] = json.loads(done.stdout)
    assert result["thresholds"]["chosen_on"].startswith("the images outside the test split")
    assert list(result["thresholds"]["outputs"]) == ["pale"]
    assert result["thresholds"]["outputs"]["pale"]["positives"] == 6


# --- what is refused ------------------------------------------------------------------------------


def test_another_feature_other_weights_and_other_backbones_are_refused(tmp_path):
    _, _, name = of_open_clip(tmp_path)
    store, prompts = extracted(tmp_path, name, pools=("pooled", "mean")), written(tmp_path)
    with pytest.raises(ProbeError, match="compares texts with final/pooled or final/proj, .* not "):
        head_of(store, prompts, feature="final/mean")
    state = load_file(tmp_path / "open_clip_model.safetensors")
    state["visual.conv1.weight"] += 1e-3
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(BackboneError, match="these weights hold another image tower"):
        head_of(store, prompts, str(tmp_path / "other.safetensors"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(BackboneError, match="holds a tuned image tower alone"):
        head_of(store, prompts, str(tmp_path / "run"))
    other = extracted(tmp_path, "timm:test_vit", "random")
    with pytest.raises(BackboneError, match="timm:test_vit has no text tower: those that have one"):
        head_of(other, prompts)
    (tmp_path / "b").mkdir()
    mean = extracted(tmp_path / "b", name, pools=("mean",))
    with pytest.raises(
        ProbeError, match="has no final/pooled or final/proj, .* with --pool pooled"
    ):
        head_of(mean, prompts)


def test_an_image_tower_alone_of_transformers_has_no_text(tmp_path):
    import transformers

    model = of_transformers(tmp_path)
    prompts = written(tmp_path)
    store = extracted(tmp_path, f"hf:{tmp_path}")
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("text_model.enc")}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match="its file has no text_model.encoder"):
        head_of(store, prompts)
    transformers.CLIPVisionModel(model.config.vision_config).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="CLIPVisionModel.* no text tower"):
        text_transformers.load_any(str(tmp_path), None)


def test_a_tokenizer_that_can_t_be_had_is_said_with_the_next_step(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    of_transformers(tmp_path)
    store, prompts = extracted(tmp_path, f"hf:{tmp_path}"), written(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).unlink()
    with pytest.raises(BackboneError, match=r"That was its tokenizer, .*beside config\.json"):
        head_of(store, prompts)
    folder = tmp_path / "open_clip"
    folder.mkdir()
    _, _, name = of_open_clip(folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "medprobe/none"
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    store = extracted(tmp_path, name)
    with pytest.raises(BackboneError, match="That was its tokenizer, .*openclip:local-dir:FOLDER"):
        head_of(store, prompts)


def test_code_beside_a_tokenizer_or_a_text_tower_is_neither_run_nor_asked_about(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\nclass Any: pass\n")
    (evil / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Any"}})
    )
    tokens = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Any", "evil.Any"]}}
    (evil / "tokenizer_config.json").write_text(json.dumps(tokens))
    prompts = written(tmp_path)
    more = [
        {"hf_tokenizer_name": str(evil), "tokenizer_kwargs": {"trust_remote_code": True}},
        {"hf_model_name": str(evil), "hf_pooler_type": "mean_pooler"},
    ]
    for k, text in enumerate(more):
        folder = tmp_path / f"model{k}"
        folder.mkdir()
        _, _, name = of_open_clip(folder)
        store = extracted(folder, name)
        config = json.loads((folder / "open_clip_config.json").read_text())
        config["model_cfg"]["text_cfg"] |= text
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        for file in ("evil.py", "tokenizer_config.json"):
            (folder / file).write_bytes((evil / file).read_bytes())
        with pytest.raises(BackboneError):
            head_of(store, prompts)
    hf = tmp_path / "hf"
    hf.mkdir()
    of_transformers(hf)
    store = extracted(hf, f"hf:{hf}")
    for file in ("evil.py", "tokenizer_config.json"):
        (hf / file).write_bytes((evil / file).read_bytes())
    (hf / "tokenizer.json").unlink()
    with pytest.raises(BackboneError):
        head_of(store, prompts)
    assert not (tmp_path / "trace").exists()


def test_a_text_that_is_too_long_is_said(tmp_path):
    _, _, name = of_open_clip(tmp_path)
    store = extracted(tmp_path, name)
    long = " ".join(["word"] * 40)
    prompts = written(tmp_path, f"dark: {long}\nmid: {' '.join(['x'] * 22)}\npale: short")
    found, _ = head_of(store, prompts)
    assert found.too_long == (long,)  # 24 tokens with both ends: 22 words fit
    result = probe(store, out=tmp_path / "out", text=Asked(prompts),
                   settings=OPTIONS)  # fmt: skip
    assert "of 1 the text tower doesn't read the end, 'word word" in result.notes[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--head", "zero-shot"), "--head zero-shot wants --prompts FILE"),
        (("--prompts", "x"), "--prompts goes with --head zero-shot"),
        (("--head", "knn", "--weights", "x"), "--weights goes with --head zero-shot"),
        (("--head", "zero-shot", "--prompts", "x", "--C", "1"), "not trained: leave --C out"),
        (("--head", "zero-shot", "--prompts", "x", "--shots", "1"), "leave --shots out"),
        (("--head", "zero-shot", "--prompts", "x", "--folds", "3"), "leave --folds out"),
        (("--head", "zero-shot", "--prompts", "x", "--control", "shuffle"), "leave --control out"),
        (("--head", "zero-shot", "--prompts", "x", "--epochs", "3"), "--epochs goes with a head"),
        (("--head", "zero-shot", "--prompts", "x", "--k", "3"), "--k and --temperature are of"),
        (("--head", "zero-shot", "--prompts", "x", "--protocol", "mieb"), "has a linear head"),
        (("--head", "zero-shot", "--protocol", "study"), "a linear or a deit head, not zero-shot"),
    ],
)
def test_options_that_mean_nothing_to_a_zero_shot_head_are_refused(tmp_path, words, said):
    done = call("probe", tmp_path / "store.h5", "-o", tmp_path / "out", *words)
    assert done.exit_code != 0
    assert said in done.stderr
