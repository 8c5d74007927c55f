"""Others' tests that fail on Mono-InternVL, each with its reason; `run.py` fails on a missing or a stale one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """`tests`: ids of tests in the suite (`Class::test`, `*` for anything), of which none passes and some fails;
    `versions`: where that is so, of transformers as pip writes them, everywhere if empty; `says`: what the error
    holds."""

    suite: str
    tests: tuple[str, ...]
    reason: str
    versions: str = ""
    says: str = ""


IMAGES = "MonoInternVLImageProcessingTest::"
DECODERS = "TestDecoderModels::"
BATCHING = "NanoContinuousBatchingTest::"
PIPELINE = "NanoPipelineTest::"

NO_RESCALING = "pixels are always divided by 255, as the released model wants them: another rescale_factor is refused"
A_LLAMA = "names the parts of another model (`model.layers`, `model.embed_tokens`), which are one level deeper here"
LAST_EXPERT = (
    "wants a gradient for every parameter; the last layer's V-expert has none where only text is a target, since no "
    "later token reads what it writes"
)
NO_PICTURE = "wants all but `model.visual` to learn from text alone; what sees is called otherwise here, and learns not"

FAILURES = (
    Failure(
        "image_processor",
        (IMAGES + "test_call_numpy_4_channels",),
        "four channels and their four means: a picture has three colours here, and transparency is put on white",
    ),
    Failure(
        "image_processor",
        (IMAGES + "test_new_models_require_torchvision_backend",),
        "a rule of transformers' repository; the pixels must be Pillow's, as the released model was trained on them",
    ),
    Failure(
        "image_processor",
        (IMAGES + "test_image_processor_from_dict_with_kwargs_has_attributes",),
        "sets do_convert_rgb=False; pictures always become RGB",
        ">=5.18",
    ),
    Failure(
        "image_processor",
        (IMAGES + "test_valid_kwargs_set",),
        "wants a class name by a convention of transformers' repository",
        ">=5.18",
    ),
    Failure(
        "image_processor",
        (IMAGES + "test_image_processor_save_load_with_autoimageprocessor",),
        "before 5.18 AutoImageProcessor is a placeholder that wants torchvision",
        "<5.18",
    ),
    Failure(
        "processor",
        ("*ProcessorTest::test_apply_chat_template_image_*",),
        "passes num_frames=2 and fps with pictures; options of videos are refused",
    ),
    Failure(
        "processor",
        ("*ProcessorTest::test_call_arguments_not_in_processor_kwargs",),
        "a rule for signatures in transformers' repository; return_tensors is one argument by either way",
        ">=5.18",
    ),
    Failure(
        "processor",
        ("*ProcessorTest::test_chat_template_message_objects",),
        "its own template reads a picture's `url`; a template of ours gets every picture as `image`, whatever the form",
        ">=5.18",
    ),
    Failure(
        "processor",
        ("*ProcessorTest::test_processor_from_and_save_pretrained*",),
        "compares all entries; `auto_map`, by which remote code is found, is written on saving and not read back",
    ),
    Failure(
        "processor",
        (
            "*ProcessorTest::test_kwargs_overrides_default_subprocessor_kwargs_0_images",
            "*ProcessorTest::test_structured_kwargs_nested_from_dict_0_images",
            "*ProcessorTest::test_subprocessor_defaults_preserved_by_kwargs_0_images",
            "*ProcessorTest::test_unstructured_kwargs_0_images",
        ),
        NO_RESCALING,
    ),
    Failure(
        "processor",
        ("*ProcessorTest::test_unstructured_kwargs_batched_0_images",),
        "gives max_length without truncation beside padding='longest', which is refused because nothing would read it",
    ),
    Failure(
        "processor",
        ("MonoInternVLTilesProcessorTest::test_get_num_multimodal_tokens_matches_processor_call",),
        "counts two pictures of a prompt as two prompts; they share one budget of tiles, which a list of lists says",
    ),
    Failure(
        "pipeline",
        (PIPELINE + "test_the_common_call",),
        "asks the tokenizer for `image_token`, and writes no placeholder without it; ours stands with the processor",
    ),
    Failure(
        "pipeline",
        (PIPELINE + "test_preprocess_empty_processor_kwargs_not_leaked",),
        "passes unrelated_kwarg=True and wants a warning; an unknown option is refused by name",
    ),
    Failure(
        "pipeline",
        (PIPELINE + "test_model_pt_chat_template_with_response_template_prefix",),
        "its own template writes LLaVA's mark for a picture",
    ),
    Failure(
        "continuous_batching",
        (BATCHING + "test_block_sharing_with_hybrid_model",),
        "counts the layer groups of a Gemma, whose windows slide; its prompt is too long in the nano's tokens",
    ),
    Failure(
        "continuous_batching",
        (BATCHING + "test_prefix_sharing",),
        "looks into parts of the engine that have other names in the installed version than in these sources",
        ">=5.18",
    ),
    Failure(
        "continuous_batching",
        (
            BATCHING + "test_switch_to_cb_friendly_attn_1_paged_sdpa",
            BATCHING + "test_switch_to_cb_friendly_attn_2_sdpa",
        ),
        "wants the name `paged|sdpa`; the installed version needs the prefix no more",
        ">=5.24",
    ),
    Failure(
        "continuous_batching",
        (
            BATCHING + "test_continuous_batching_config_combinations_with_compile_0_eager",
            BATCHING + "test_continuous_batching_config_combinations_with_compile_1_sdpa",
        ),
        "wants one graph, which the engine's cache forbids since it is called inside the model (a Llama fails alike)",
        ">=5.18",
    ),
    Failure(
        "peft",
        (
            DECODERS + "test_prompt_tuning_trust_remote_code",
            DECODERS + "test_lora_layer_replication",
            DECODERS + "test_save_pretrained_targeting_lora_to_embedding_layer[*-auto]",
            DECODERS + "test_save_pretrained_targeting_lora_to_embedding_layer[*-True]",
            DECODERS + "test_lora_embed_scale_is_applied*",
            DECODERS + "test_merge_and_unload_fixes_tie_word_embeddings_config",
        ),
        A_LLAMA,
    ),
    Failure(
        "peft",
        (
            DECODERS + "test_prefix_tuning_gemma4_warns_if_some_layers_skipped",
            DECODERS + "test_prefix_tuning_gemma4_raises_if_all_layers_skipped",
        ),
        "is about the layers of a Gemma 4",
        ">=5.18",
    ),
    Failure(
        "peft",
        (DECODERS + "test_training_decoders[IA3Config-*]", DECODERS + "test_training_decoders[OSFConfig-*]"),
        LAST_EXPERT,
    ),
    Failure(
        "peft",
        (DECODERS + "test_merge_layers*[BeftConfig-*]",),
        "BEFT changes biases, and the layers have none; a Llama is left out of it for the same reason",
        ">=5.18",
    ),
    Failure(
        "peft",
        tuple(
            f"{DECODERS}{test}[PrefixTuningConfig-*]"
            for test in ("test_generate", "test_generate_pos_args", "test_generate_half_prec", "test_disable_adapter")
        ),
        "PEFT 0.21 gives the prefix by the cache's older name beside generate's own cache; transformers' models leave "
        "the prefix out without a word, ours refuses",
        ">=5.24",
    ),
    Failure(
        "peft",
        (DECODERS + "*[*ShadowConfig-*]",),
        "looks for the decoder's layers right below the model; a composite one names them in target_modules",
        ">=5.18",
    ),
    Failure("trl", ("Test*::test_train_vlm_text_only_data[*]",), NO_PICTURE, says="Param model.vision_embeddings"),
    Failure(
        "trl",
        (
            "TestSFTTrainer::test_train_vlm_multi_image[*]",
            "TestSFTTrainer::test_train_vlm_prompt_completion[*]",
            "TestDPOTrainer*::test_train_vlm[*]",
            "TestDPOTrainer*::test_train_vlm_multi_image[*]",
            *(
                f"Test{trainer}Trainer*::test_train*_vlm{what}"
                for trainer in ("GRPO", "RLOO")
                for what in ("[*]", "_with_pad_to_multiple_of", "_beta_non_zero[*]")
            ),
            "TestGRPOTrainer*::test_train*_vlm_and_importance_sampling[*]",
        ),
        LAST_EXPERT,
        says="layers.1.visual_mlp",
    ),
    Failure(
        "trl",
        ("TestGRPOTrainer*::test_train*_vlm_multi_image[*]", "TestRLOOTrainer*::test_train*_vlm_multi_image[*]"),
        LAST_EXPERT,
        ">=5.18",
        says="layers.1.visual_mlp",
    ),
    Failure(
        "trl",
        ("TestGRPOTrainer*::test_train*_vlm_multi_image[*]", "TestRLOOTrainer*::test_train*_vlm_multi_image[*]"),
        "TRL 1.0 cuts a batch by rows but its pictures by their number, which the model refuses by both counts",
        "<5.18",
        says="visual tokens but the input has",
    ),
    Failure(
        "trl",
        ("TestKTOTrainerVLM::test_train_vlm[*]", "TestKTOTrainerVLM::test_train_vlm_multi_image[*]"),
        LAST_EXPERT,
        ">=5.18",
        says="layers.1.visual_mlp",
    ),
)
