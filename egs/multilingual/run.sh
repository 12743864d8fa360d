#!/usr/bin/env bash
# Five languages (de es fr pt ro): trains the ML base model of the mini preset from nothing, on synthetic speech.
#
#   ./run.sh                 every stage, 0 to 11
#   ./run.sh --stop-stage 7  as far as the base model, exp/random-all-seed1/averaged.pt
set -euo pipefail
# shellcheck source=tools/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../tools/recipe.sh"

stage 0 "make or find the corpora -> $data/corpus" py data.download
stage 1 "manifests, normalised text -> $data/manifests" py data.corpora
stage 2 "filter banks -> $data/fbank" py data.features
stage 3 "the hours to train on -> $data/manifests" py data.subset
stage 4 "tokens of their text -> $data/lang" py data.tokenizer
stage 5 "what training starts from -> $exp/init.pt" py transfer
stage 6 "fine-tune -> $exp/checkpoints" py train
stage 7 "average -> $exp/averaged.pt" py average
stage 8 "export to ONNX -> $exp/onnx" py export
stage 8 "language models of text -> $exp/language_model" py language_model
stage 9 "decode -> $exp/decode" py decode
stage 9 "decode as if recorded elsewhere -> $exp/decode" py robustness
stage 10 "score" py score
stage 11 "pack to hand over -> $exp/bundle" py pack
