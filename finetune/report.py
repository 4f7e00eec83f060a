"""OUT/report.png: the curves of a run's metrics.jsonl.

python -c "from pathlib import Path; from finetune.report import write_report; write_report(Path('out/RUN'))"
"""

from pathlib import Path

from finetune.metrics import read_metrics


def write_report(out: Path) -> Path:
    """Training and validation loss, learning rate, gradient norm and speed over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needed at a run's end only
    from matplotlib.figure import Figure

    lines = read_metrics(out / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    checks = [line for line in lines if "val_loss" in line]
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(out.name)
    panels = (("loss", "loss, nats per token"), ("lr", "learning rate"), ("grad_norm", "gradient norm"))
    for i, (key, label) in enumerate((*panels, ("tokens_per_s", "tokens per second")), start=1):
        axes = figure.add_subplot(2, 2, i)
        axes.plot([line["step"] for line in steps], [line[key] for line in steps], linewidth=1, label="training")
        if key == "loss":
            axes.plot([c["step"] for c in checks], [c["val_loss"] for c in checks], marker="o", label="validation")
            axes.legend()
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    path = out / "report.png"
    figure.savefig(path, dpi=120)
    return path
