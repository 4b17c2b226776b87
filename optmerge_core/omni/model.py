"""One language model, many modality towers, as one transformers model (Section 5 of the paper).

A *specialist* is a stock multimodal model: a tower and a projector for one modality, on a language
model. `compose` merges the specialists' language models into one and keeps every tower and
projector as it is; `OmniForConditionalGeneration` then takes all modalities at once.
"""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel


class OmniConfig(PretrainedConfig):
    """text_config: the language model's; specialists: modality -> the specialist's whole config."""

    model_type = "optmerge_omni"
    sub_configs = {"text_config": AutoConfig}

    def __init__(self, text_config=None, specialists=None, **kwargs):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**without_dtype(text_config))
        self.text_config = text_config or AutoConfig.for_model("llama")
        self.specialists = without_dtype(specialists or {})
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)


def without_dtype(config: dict) -> dict:
    """A config without the dtypes of its parts: all of an Omni model is loaded in one dtype."""
    return {
        key: without_dtype(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("dtype", "torch_dtype")
    }


class Tap(nn.Module):
    """In a specialist, in its language model's place: embeds as told, returns what it is given."""

    def __init__(self):
        super().__init__()
        self.embeddings = None

    def get_input_embeddings(self):
        return lambda input_ids: self.embeddings

    def forward(self, inputs_embeds=None, **_):
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


def specialist_class(config: dict) -> type[PreTrainedModel]:
    """The stock class that config.json's `architectures` names."""
    name = (config.get("architectures") or ["nothing"])[0]
    model_class = getattr(transformers, name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise ValueError(
            f"a specialist's config.json names {name} as its architecture, which transformers "
            f"{transformers.__version__} does not have; specialists are stock multimodal models"
        )
    return model_class


def without_layers(config: dict) -> PretrainedConfig:
    """A specialist's configuration with a language model of no layers, to load its towers alone."""
    shrunk = AutoConfig.for_model(**config)
    shrunk.get_text_config().num_hidden_layers = 0
    return shrunk


def towers_of(model: PreTrainedModel) -> nn.Module:
    """A specialist without its language model: what is left computes its features."""
    inner = model.base_model
    inner.language_model = Tap()
    return inner


class OmniForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A language model that reads the features of every specialist's tower in its prompt.

    `modality_inputs` maps modality -> what that specialist's own forward takes beside `input_ids`
    (`pixel_values`, `input_features` with `feature_attention_mask`, `pixel_values_videos`, ...).
    Each specialist puts its features in the place of its own placeholder tokens, one for each
    feature (what its processor expands the prompt to).
    """

    config_class = OmniConfig
    config: OmniConfig
    _tied_weights_keys = {"lm_head.weight": "language_model.embed_tokens.weight"}
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: OmniConfig):
        super().__init__(config)
        text = config.text_config
        self.language_model = AutoModel.from_config(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.specialists = nn.ModuleDict(
            {
                modality: towers_of(specialist_class(settings)(without_layers(settings)))
                for modality, settings in config.specialists.items()
            }
        )
        self.token_kinds: Tensor | None = None
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def embed(self, input_ids: Tensor, modality_inputs: dict | None = None) -> Tensor:
        """Prompts (b, t) -> embeddings (b, t, hidden), the modalities' features in place.

        `token_kinds` (b, t) then says what each is: 0 text, i a feature of the i-th specialist.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        self.token_kinds = torch.zeros_like(input_ids)
        for modality, inputs in (modality_inputs or {}).items():
            if modality not in self.specialists:
                raise ValueError(
                    f"no specialist for {modality!r}: this model has {', '.join(self.specialists)}"
                )
            specialist = self.specialists[modality]
            specialist.language_model.embeddings = embeddings
            mask = torch.ones_like(input_ids)
            outputs = specialist(input_ids=input_ids, attention_mask=mask, **inputs)
            filled = outputs.last_hidden_state
            specialist.language_model.embeddings = None
            if filled.shape != embeddings.shape:
                raise ValueError(
                    f"{modality}: the prompt has {embeddings.shape[1]} tokens and becomes "
                    f"{filled.shape[1]} long; give one placeholder token for each feature"
                )
            kind = 1 + list(self.specialists).index(modality)
            self.token_kinds[(filled != embeddings).any(-1)] = kind
            embeddings = filled
        return embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        modality_inputs: dict | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (b, t, vocabulary), and with `labels` (b, t, -100 where not counted) the loss."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, modality_inputs)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids,
        modality_inputs=None,
        inputs_embeds=None,
        is_first_iteration=False,
        **kwargs,
    ):
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        first = is_first_iteration or not kwargs.get("use_cache", True)
        return inputs | {"modality_inputs": modality_inputs if first else None}


AutoConfig.register(OmniConfig.model_type, OmniConfig, exist_ok=True)
AutoModel.register(OmniConfig, OmniForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(OmniConfig, OmniForConditionalGeneration, exist_ok=True)
