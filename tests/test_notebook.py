"""The example notebook runs from its first cell to its last."""

import os

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")


@pytest.mark.slow
def test_the_quickstart_notebook_runs(root, tmp_path, monkeypatch):
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    # Compiled in full, as users have it.
    options = {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    for option in options.items():
        monkeypatch.setenv(*option)
    notebook = nbformat.read(root / "examples" / "quickstart.ipynb", as_version=4)
    assert any("image/png" in out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", []))
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    printed = "".join(output.get("text", "") for output in outputs)
    assert "bought:" in printed and "next:" in printed and "item-kNN" in printed
    assert (tmp_path / "workdirs" / "notebook" / "report" / "metrics.json").exists()
