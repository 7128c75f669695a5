import pytest

from simgr_jax.devices.choose_dtype import choose_dtype

X86 = "processor\t: 0\nmodel name\t: bf16 avx512_bf16\nflags\t\t: fpu sse2 avx2 {}\n\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd {}\nCPU part\t: 0xd40\n"


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        (X86.format("avx512f avx512_bf16"), "float32"),
        (X86.format("amx_bf16 amx_tile"), "bfloat16"),
        (X86.format("avx512f"), "float32"),
        (ARM.format("bf16 i8mm"), "bfloat16"),
        (ARM.format("i8mm"), "float32"),
        ("processor: 0\n", "float32"),
    ],
)
def test_cpus_compute_in_bfloat16_if_they_have_units_for_it(tmp_path, text, dtype):
    (tmp_path / "cpuinfo").write_text(text * 2)
    assert choose_dtype("cpu", tmp_path / "cpuinfo") == dtype


def test_accelerators_compute_in_bfloat16_and_unknown_cpus_in_float32(tmp_path):
    assert choose_dtype("tpu", tmp_path) == choose_dtype("gpu") == "bfloat16"
    assert choose_dtype("cpu", tmp_path / "cpuinfo") == "float32"
