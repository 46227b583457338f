"""Files to models and back. Nothing is imported here; each module has one idea:

files             files of strangers read whole: copies, sha256
json_file         JSON from strangers, within limits; ours, as the standard has it
safetensors_file  one .safetensors file: its header checked, its tensors read lazily or streamed out
layout            which files of a folder are the model: Hugging Face's layout or Mistral's own
names             the one table of tensor names and shapes in both layouts
config_files      config.json and params.json <-> ModelConfig
nf4_file          bitsandbytes' 4-bit layout: one weight and what stands beside it, read and written
finite            numbers that are not finite, refused by name and index
open              all headers of a folder against its config, before any memory is taken; the fingerprint of a base
load              tensor by tensor into a model, quantized to NF4 on the way
write             crash-safe files and folders: temporary name, fsync, rename
save              a model as a folder, in both layouts
quantize          a folder to a folder in NF4, tensor by tensor
export            a folder to a folder in another program's format, reopened and compared
gguf_header       what llama.cpp's one file says before its tensors, read within limits
gguf_file         that file, written and compared
chat_template     the chat template as Jinja, for programs that render a conversation
card              README.md of a model
merge             base plus adapter as plain weights, tensor by tensor
adapter_parts     an adapter in memory: which tensors it has, and how it is put into a model
adapter           adapters and prefixes in PEFT's layout; reading either layout
mistral_adapter   LoRA adapters in the layout of mistral-finetune
provenance        minilora.json beside an adapter or a model, and what of it is checked
"""
