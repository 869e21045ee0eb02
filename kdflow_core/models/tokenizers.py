"""Tokenizers from local folders. Loads no model code."""

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kdflow_core.errors import ModelError

REASON_SIGNS = 600
# What libraries may raise over files that are not what they should be: nothing less.
LIBRARY_ERRORS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises ModelError."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except LIBRARY_ERRORS as error:
        raise ModelError(f"cannot load the tokenizer of {folder}: {reason_of(error)}") from error


def tokenizer_of_files(vocab: Path, merges: Path, *, end: str) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of GPT-2's two files; `end` ends a text. Raises ModelError."""
    try:
        made = Tokenizer(BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # what the library raises has no narrower type
        raise ModelError(f"cannot read the tokenizer of {vocab} and {merges}: {error}") from error
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=end, eos_token=end)


def reason_of(error: Exception) -> str:
    """What a library's error says, on one line."""
    if "trust_remote_code" in str(error):
        return (
            "it brings Python code of its own, which is not run unless you allow it: read that "
            "code, then set trust_remote_code=true beside the model's path"
        )
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:REASON_SIGNS]


def true_vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest token id. Rows of the head beyond it are padding."""
    return max(tokenizer.get_vocab().values()) + 1


def same_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give ids the same meaning."""
    return bool(student.get_vocab() == teacher.get_vocab())


def check_same_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> None:
    """Refuse two tokenizers that give ids different meanings. Raises ModelError."""
    if same_vocabulary(student, teacher):
        return
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    differing = sorted(
        token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)
    )
    token = differing[0]
    raise ModelError(
        f"student and teacher have different vocabularies: {len(ours)} and {len(theirs)} tokens, "
        f"{len(differing)} differ, for instance {token!r} (id {ours.get(token)} and "
        f"{theirs.get(token)}). Their logits cannot be compared token by token; choose a student "
        "of the teacher's family (same tokenizer), or set alignment=bytes"
    )
