// Group normalisation of bfloat16 activations, channels last, forward and backward.
// PyTorch's own CPU backward of this case takes half of a training step. One pass over the memory sums, one applies.
#include <torch/extension.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

inline float widen(uint16_t bits) {
  uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

inline uint16_t narrow(float value) {  // round to nearest, ties to even
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  return static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

struct Sizes {
  int64_t rows, places, channels, groups, width;
};

Sizes sizes_of(const torch::Tensor& input, int64_t groups) {
  TORCH_CHECK(input.is_contiguous() && input.scalar_type() == torch::kBFloat16, "expects contiguous bfloat16");
  TORCH_CHECK(input.dim() == 3 && input.size(2) % groups == 0, "expects (rows, places, channels), channels in groups");
  return {input.size(0), input.size(1), input.size(2), groups, input.size(2) / groups};
}

}  // namespace

// input (N, L, C) bfloat16, weight and bias (C) float -> output as input, mean and reciprocal deviation (N, G) float
std::vector<torch::Tensor> forward(torch::Tensor input, torch::Tensor weight, torch::Tensor bias, int64_t groups,
                                   double epsilon) {
  const Sizes n = sizes_of(input, groups);
  auto output = torch::empty_like(input);
  auto means = torch::empty({n.rows, groups}, torch::kFloat);
  auto scales = torch::empty({n.rows, groups}, torch::kFloat);
  const auto* in = static_cast<const uint16_t*>(input.data_ptr());
  auto* out = static_cast<uint16_t*>(output.data_ptr());
  const float *gain = weight.data_ptr<float>(), *shift = bias.data_ptr<float>();
  float *mean = means.data_ptr<float>(), *scale = scales.data_ptr<float>();
  at::parallel_for(0, n.rows, 1, [&](int64_t first, int64_t last) {
    std::vector<float> sum(n.channels), squares(n.channels), factor(n.channels), offset(n.channels);
    for (int64_t row = first; row < last; row++) {
      std::fill(sum.begin(), sum.end(), 0.f);
      std::fill(squares.begin(), squares.end(), 0.f);
      const uint16_t* x = in + row * n.places * n.channels;
      uint16_t* y = out + row * n.places * n.channels;
      for (int64_t place = 0; place < n.places; place++)
        for (int64_t c = 0; c < n.channels; c++) {
          const float value = widen(x[place * n.channels + c]);
          sum[c] += value;
          squares[c] += value * value;
        }
      for (int64_t group = 0; group < groups; group++) {
        double total = 0, total_squares = 0;
        for (int64_t c = group * n.width; c < (group + 1) * n.width; c++) {
          total += sum[c];
          total_squares += squares[c];
        }
        const double count = static_cast<double>(n.width * n.places), average = total / count;
        const double variance = std::max(total_squares / count - average * average, 0.0);
        const float reciprocal = static_cast<float>(1.0 / std::sqrt(variance + epsilon));
        mean[row * groups + group] = static_cast<float>(average);
        scale[row * groups + group] = reciprocal;
        for (int64_t c = group * n.width; c < (group + 1) * n.width; c++) {
          factor[c] = reciprocal * gain[c];
          offset[c] = shift[c] - static_cast<float>(average) * reciprocal * gain[c];
        }
      }
      for (int64_t place = 0; place < n.places; place++)
        for (int64_t c = 0; c < n.channels; c++)
          y[place * n.channels + c] = narrow(widen(x[place * n.channels + c]) * factor[c] + offset[c]);
    }
  });
  return {output, means, scales};
}

// gradient of the output (N, L, C) bfloat16 -> gradients of input (bfloat16), weight and bias (float)
std::vector<torch::Tensor> backward(torch::Tensor gradient, torch::Tensor input, torch::Tensor weight,
                                    torch::Tensor means, torch::Tensor scales, int64_t groups) {
  const Sizes n = sizes_of(input, groups);
  sizes_of(gradient, groups);
  auto input_gradient = torch::empty_like(input);
  auto weight_gradient = torch::empty({n.rows, n.channels}, torch::kFloat);
  auto bias_gradient = torch::empty({n.rows, n.channels}, torch::kFloat);
  const auto* in = static_cast<const uint16_t*>(input.data_ptr());
  const auto* upstream = static_cast<const uint16_t*>(gradient.data_ptr());
  auto* out = static_cast<uint16_t*>(input_gradient.data_ptr());
  const float *gain = weight.data_ptr<float>(), *mean = means.data_ptr<float>(), *scale = scales.data_ptr<float>();
  float *of_weight = weight_gradient.data_ptr<float>(), *of_bias = bias_gradient.data_ptr<float>();
  at::parallel_for(0, n.rows, 1, [&](int64_t first, int64_t last) {
    std::vector<float> sum(n.channels), products(n.channels), a(n.channels), b(n.channels), c0(n.channels);
    for (int64_t row = first; row < last; row++) {
      std::fill(sum.begin(), sum.end(), 0.f);
      std::fill(products.begin(), products.end(), 0.f);
      const uint16_t* x = in + row * n.places * n.channels;
      const uint16_t* d = upstream + row * n.places * n.channels;
      uint16_t* y = out + row * n.places * n.channels;
      for (int64_t place = 0; place < n.places; place++)
        for (int64_t c = 0; c < n.channels; c++) {
          const float slope = widen(d[place * n.channels + c]);
          sum[c] += slope;
          products[c] += slope * widen(x[place * n.channels + c]);
        }
      for (int64_t group = 0; group < groups; group++) {
        const float average = mean[row * groups + group], reciprocal = scale[row * groups + group];
        double slope = 0, product = 0;
        for (int64_t c = group * n.width; c < (group + 1) * n.width; c++) {
          const float normalised = (products[c] - average * sum[c]) * reciprocal;
          of_weight[row * n.channels + c] = normalised;
          of_bias[row * n.channels + c] = sum[c];
          slope += sum[c] * gain[c];
          product += normalised * gain[c];
        }
        const float count = static_cast<float>(n.width * n.places);
        const float along = static_cast<float>(product) / count, level = static_cast<float>(slope) / count;
        for (int64_t c = group * n.width; c < (group + 1) * n.width; c++) {
          a[c] = reciprocal * gain[c];
          b[c] = -reciprocal * reciprocal * along;
          c0[c] = reciprocal * (reciprocal * along * average - level);
        }
      }
      for (int64_t place = 0; place < n.places; place++)
        for (int64_t c = 0; c < n.channels; c++) {
          const int64_t at = place * n.channels + c;
          y[at] = narrow(widen(d[at]) * a[c] + widen(x[at]) * b[c] + c0[c]);
        }
    }
  });
  return {input_gradient, weight_gradient.sum(0), bias_gradient.sum(0)};
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("forward", &forward);
  module.def("backward", &backward);
}
