"""Registry of architecture specs: Hugging Face `model_type` -> `ArchitectureSpec`."""

from dataclasses import replace

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from das_ds.errors import ModelError
from das_ds.models.architectures.bert import BERT, ELECTRA
from das_ds.models.architectures.deberta import DEBERTA_V2
from das_ds.models.architectures.distilbert import DISTILBERT
from das_ds.models.architectures.gpt2 import GPT2
from das_ds.models.architectures.gpt_neox import GPT_NEOX
from das_ds.models.architectures.llama import GEMMA2, GEMMA3_TEXT, LLAMA, MISTRAL, OLMO2, QWEN2, QWEN3
from das_ds.models.architectures.mixtral import MIXTRAL, QWEN3_MOE
from das_ds.models.architectures.modernbert import MODERNBERT
from das_ds.models.architectures.opt import OPT
from das_ds.models.architectures.phi3 import PHI3
from das_ds.models.architectures.roberta import ROBERTA, XLM_ROBERTA
from das_ds.models.architectures.spec import ArchitectureSpec

ENCODERS = (BERT, ROBERTA, XLM_ROBERTA, DISTILBERT, ELECTRA, DEBERTA_V2, MODERNBERT)
DECODERS = (GPT2, GPT_NEOX, OPT, LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, GEMMA2, GEMMA3_TEXT, PHI3, MIXTRAL, QWEN3_MOE)
ARCHITECTURES: dict[str, ArchitectureSpec] = {spec.model_type: spec for spec in (*ENCODERS, *DECODERS)}


def spec_for(model_type: str, is_decoder: bool = False) -> ArchitectureSpec:
    """The registered spec of a Hugging Face `model_type`.

    Args:
        model_type: of the model's config.
        is_decoder: the config's attribute of that name: an encoder's attention is causal then, as of BERT in
            `BertLMHeadModel`, and its objective causal language modeling.

    Raises:
        ModelError: no registered spec; the message lists the known types. Or transformers has no causal model of it.
    """
    if model_type not in ARCHITECTURES:
        raise ModelError(
            f"no architecture spec for model type {model_type!r}; known: {', '.join(sorted(ARCHITECTURES))}; "
            "`das-ds inspect MODEL` proposes a table for model.architecture"
        )
    spec = ARCHITECTURES[model_type]
    if not is_decoder:
        return spec
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"model config of type {model_type!r}: found is_decoder true, but transformers has no causal language "
            "model of this type; expected false"
        )
    return replace(spec, objective="clm")
