"""What stands around the passes of Olive's workflow files: the model, data, systems and how to run."""

from collections.abc import Mapping

from quantcli.cli.aliases import Dropped, Refused, Rename, Switch
from quantcli.cli.configuration.keys import Key, Keys, Nested, only

__all__ = ["BESIDE", "DATA", "INPUT_MODEL", "SYSTEM", "WORKFLOW"]

_HERE = "it runs where it is called"
_EVALUATORS = Refused("evaluators are for a search", "use `quantcli tune`, or leave it out and add --evaluate")

BESIDE: Keys = {
    "disable_search": only("true or false", "quantize chooses nothing", "True"),
    "host": only("text", _HERE),
    "evaluator": Key("any", _EVALUATORS),
}
"""What may stand in a pass beside its own keys."""

_LOAD: Mapping[str, Key] = {
    "type": only("text", "files and data sets are read", "huggingface_dataset"),
    "data_name": Key("text", Rename("--data_name")),
    "split": Key("text", Rename("--data-split")),
    "data_files": Key("text", Rename("--data_files")),
    "subset": Key("text", Rename("--subset")),
    "data_dir": Key("text", Refused("data sets are read whole", "give the file itself as data_files")),
    "col_filters": Key("object", Refused("rows are not filtered", "give a file of the rows as data_files")),
    "trust_remote_code": only("true or false", "scripts of data sets are not run", "False"),
}
_TEXT_TYPES = ("text_generation_huggingface_dataset", "huggingface_pre_process", "text_generation", "skip_pre_process")
_PREPARE: Mapping[str, Key] = {
    "type": only("text", "text is made into rows of tokens", *_TEXT_TYPES),
    "max_seq_len": Key("whole number", Rename("--seq-len")),
    "max_samples": Key("whole number", Rename("--num-samples")),
    "text_cols": Key("text", Rename("--text-field")),
    "text_template": Key("text", Rename("--text-template")),
    "chat_template": Key("true or false", Switch(("--use-chat-template",))),
    "message_col": only("text", "messages stand in the field messages", "messages"),
    "strategy": only("text", "documents are joined, then cut into rows", "join", "join-random"),
    "joiner": Key("text", Refused("the model's end token stands between documents", "leave it out")),
    "random_seed": Key("whole number", Rename("--seed")),
    "add_special_tokens": Key(
        "true or false", Refused("end tokens stand between documents, rows begin as texts do", "leave it out")
    ),
    "model_name": only("text", "the model's own tokenizer is used"),
    "task": only("text", "the task is text generation", "text-generation", "text-generation-with-past"),
    "text_formatting_func": Key("text", Refused("text is made by a template", "use text_template")),
    "input_cols": Key("any", Refused("only text of one field is read", "write arrays, and use --calibration-inputs")),
    "label_col": only("text", "labels are not read"),
}
_FEED: Mapping[str, Key] = {
    "type": Key("text", Rename("--data-function", {"default_dataloader": (), "default_calibration_dataloader": ()})),
    "batch_size": Key("whole number", Rename("--batch-size")),
}


def _component(keys: Keys) -> Key:
    """A part of a data configuration; older files have its keys under "params"."""
    return Key("object", Nested({**keys, "params": Key("object", Nested(keys))}))


DATA: Keys = {
    "name": Key("text", None),
    "type": only("text", "files and data sets are read", "HuggingfaceContainer", "DataContainer"),
    "user_script": Key("text", Rename("--user-script")),
    "script_dir": Key("text", Refused("scripts are files", "give the file as user_script")),
    "load_dataset_config": _component(_LOAD),
    "pre_process_data_config": _component(_PREPARE),
    "dataloader_config": _component(_FEED),
    "post_process_data_config": Key("object", Dropped("outputs are not looked at")),
}
"""Keys of a data configuration."""

_MODEL: Mapping[str, Key] = {
    "model_path": Key("text", Rename("--model")),
    "task": Key("text", Rename("--task")),
    "adapter_path": Key("text", Rename("--adapter_path")),
    "onnx_file_name": Key("text", None),
    "load_kwargs": Key(
        "object",
        Nested(
            {
                "trust_remote_code": only("true or false", "it is a flag: --trust-remote-code", "False"),
                "attn_implementation": only("text", "attention is computed exactly", "eager", "sdpa"),
            }
        ),
    ),
}
INPUT_MODEL: Keys = {
    "type": only("text", "the folder says it", "HfModel", "ONNXModel", "hfmodel", "onnxmodel"),
    **_MODEL,
    "config": Key("object", Nested(_MODEL)),
}
"""Keys of the model that a workflow begins with."""

SYSTEM: Keys = {
    "type": only("text", _HERE, "LocalSystem"),
    "accelerators": Key(
        "list of objects",
        Nested(
            {
                "device": only("text", "a GPU is chosen by --device", "cpu"),
                "execution_providers": only("list of texts", "graphs are run on the CPU", "CPUExecutionProvider"),
            }
        ),
    ),
}
"""Keys of a system."""

_NO_CLOUD = Refused("there is no shared cache in the cloud", "leave it out")
_ENGINE: Mapping[str, Key] = {
    "host": only("text", _HERE),
    "target": only("text", _HERE),
    "output_dir": Key("text", Rename("--output")),
    "cache_dir": only("text", "nothing is kept between runs"),
    "clean_cache": only("true or false", "nothing is kept between runs"),
    "clean_evaluation_cache": only("true or false", "nothing is kept between runs"),
    "evaluate_input_model": only("true or false", "--evaluate compares with the input", "False"),
    "evaluator": Key("any", _EVALUATORS),
    "search_strategy": Key(
        "any", Refused("it is for a search", "use `quantcli tune`, or choose values and leave it out")
    ),
    "log_severity_level": Key("whole number", Rename("--log_level")),
    "ort_log_severity_level": only("whole number", "libraries are kept quiet"),
    "ort_py_log_severity_level": only("whole number", "libraries are kept quiet"),
    "log_to_file": only("true or false", "what is said goes to stderr", "False"),
    "no_artifacts": only("true or false", "a folder holds the model and how it came to be"),
    "enable_shared_cache": only("true or false", "there is no shared cache in the cloud", "False"),
    "cache_config": Key("object", _NO_CLOUD),
    "packaging_config": Key("any", Refused("nothing is packed into archives", "leave it out")),
}
WORKFLOW: Keys = {
    "input_model": Key("object", None),
    "data_configs": Key("any", None),
    "systems": Key("object", None),
    "passes": Key("object", None),
    "evaluators": only("object", "evaluators are for `quantcli tune`"),
    "workflow_id": only("text", "a run is called by its folder"),
    "azureml_client": Key("object", _NO_CLOUD),
    "auto_optimizer_config": Key("object", Refused("passes are not chosen for you", "name them under passes")),
    **_ENGINE,
    "engine": Key("object", Nested(_ENGINE)),
}
"""Keys of a whole workflow."""
