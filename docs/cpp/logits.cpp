// The outputs of an exported model for one row of tokens, in C++ and without Python:
//
//     cmake -S docs/cpp -B build "-DTORCH=$(python -c 'import torch; print(torch.__path__[0])')"
//     cmake --build build
//     build/logits artifacts/support-intents/traced_model.pt 101 2073 2003 2026 11521 1029 102
//
// traced_model.pt is plain TorchScript. Its inputs are those that traceserve.json names, int64 of shape (batch, length):
// here a batch of one row without padding, so that the mask is all ones and the types, where there are any, all zeros.
// (Wheels of torch before 2.7 for Linux need -D_GLIBCXX_USE_CXX11_ABI=0.)

#include <torch/script.h>

#include <iomanip>
#include <iostream>
#include <vector>

int main(int count, char** arguments) {
  if (count < 3) {
    std::cerr << "usage: logits traced_model.pt TOKEN_ID...\n";
    return 2;
  }
  try {
    c10::InferenceMode without_gradients;
    torch::jit::script::Module model = torch::jit::load(arguments[1]);
    model.eval();

    std::vector<int64_t> tokens;
    for (int i = 2; i < count; ++i) tokens.push_back(std::stoll(arguments[i]));
    const torch::Tensor ids = torch::tensor(tokens, torch::kInt64).unsqueeze(0);
    std::vector<torch::jit::IValue> inputs = {ids, torch::ones_like(ids), torch::zeros_like(ids)};
    inputs.resize(model.get_method("forward").function().getSchema().arguments().size() - 1);  // without the module itself

    const torch::Tensor logits = model.forward(inputs).toTuple()->elements()[0].toTensor().contiguous();
    std::cout << std::setprecision(9);
    for (int64_t i = 0; i < logits.numel(); ++i) std::cout << logits.data_ptr<float>()[i] << "\n";
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
