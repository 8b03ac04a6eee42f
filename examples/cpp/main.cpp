// SPDX-License-Identifier: MIT
// Compare two photographs as `patchnetvlad match-two` does, with files of `patchnetvlad export`.

#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <map>
#include <opencv2/core/utils/logger.hpp>
#include <opencv2/imgcodecs.hpp>
#include <opencv2/imgproc.hpp>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

namespace fs = std::filesystem;
using Tensors = std::map<std::string, Ort::Value>;

void check_file(const fs::path& file) {
  if (!fs::is_regular_file(file)) throw std::runtime_error(file.string() + " is not a file");
}

std::vector<std::string> input_names(const Ort::Session& model) {
  Ort::AllocatorWithDefaultOptions memory;
  std::vector<std::string> names;
  for (size_t i = 0; i < model.GetInputCount(); ++i)
    names.emplace_back(model.GetInputNameAllocated(i, memory).get());
  return names;
}

std::vector<std::string> output_names(const Ort::Session& model) {
  Ort::AllocatorWithDefaultOptions memory;
  std::vector<std::string> names;
  for (size_t i = 0; i < model.GetOutputCount(); ++i)
    names.emplace_back(model.GetOutputNameAllocated(i, memory).get());
  return names;
}

// Run a model on values in the order of its inputs; return all of its outputs by name.
Tensors run(Ort::Session& model, const std::vector<Ort::Value>& values) {
  const std::vector<std::string> inputs = input_names(model), outputs = output_names(model);
  std::vector<const char*> taken, returned;
  for (const std::string& name : inputs) taken.push_back(name.c_str());
  for (const std::string& name : outputs) returned.push_back(name.c_str());
  std::vector<Ort::Value> found = model.Run(Ort::RunOptions(), taken.data(), values.data(),
                                            values.size(), returned.data(), returned.size());
  Tensors named;
  for (size_t i = 0; i < outputs.size(); ++i) named.emplace(outputs[i], std::move(found[i]));
  return named;
}

Ort::Session open_model(const Ort::Env& env, const fs::path& file) {
  check_file(file);
  return Ort::Session(env, file.c_str(), Ort::SessionOptions());
}

// Of a network that resizes images, the number of patches is known before it sees one.
void check_resizes(const Ort::Session& network, const fs::path& file) {
  const Ort::TypeInfo image = network.GetInputTypeInfo(0);
  const Ort::TypeInfo keypoints = network.GetOutputTypeInfo(network.GetOutputCount() - 1);
  if (image.GetTensorTypeAndShapeInfo().GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 ||
      keypoints.GetTensorTypeAndShapeInfo().GetShape().at(0) < 0)
    throw std::runtime_error(file.string() + " does not resize images: export it with --resize");
}

// Return what the network says of a photograph: descriptor [1, P]; for each patch size s,
// patches_s [1, n, P] and keypoints_s [n, 2].
Tensors describe(Ort::Session& network, const fs::path& file) {
  check_file(file);
  cv::Mat image = cv::imread(file.string(), cv::IMREAD_COLOR);  // upright, whatever its EXIF says
  if (image.empty()) throw std::runtime_error(file.string() + " is not an image");
  cv::cvtColor(image, image, cv::COLOR_BGR2RGB);
  const std::vector<int64_t> shape{1, image.rows, image.cols, 3};
  std::vector<Ort::Value> values;
  values.push_back(Ort::Value::CreateTensor<uint8_t>(
      Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault), image.data,
      image.total() * image.elemSize(), shape.data(), shape.size()));
  return run(network, values);
}

// Return a view of patches [1, n, P] as [n, P], or of key points [n, 2] as they are.
Ort::Value of_one_image(Ort::Value& value) {
  const auto about = value.GetTensorTypeAndShapeInfo();
  std::vector<int64_t> shape = about.GetShape();
  if (shape.size() == 3) shape.erase(shape.begin());
  const auto type = about.GetElementType();
  const size_t size = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 ? sizeof(int64_t) : sizeof(float);
  return Ort::Value::CreateTensor(Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault),
                                  value.GetTensorMutableRawData(), about.GetElementCount() * size,
                                  shape.data(), shape.size(), type);
}

// Return the similarity of two images; larger is more similar. The inputs of the matcher are
// called query_patches_s, query_keypoints_s, candidate_patches_s and candidate_keypoints_s.
float match(Ort::Session& matcher, Tensors& query, Tensors& candidate) {
  std::vector<Ort::Value> values;
  for (const std::string& name : input_names(matcher)) {
    const size_t end = name.find('_');
    Tensors& features = name.substr(0, end) == "query" ? query : candidate;
    const auto found = features.find(name.substr(end + 1));
    if (found == features.end())
      throw std::runtime_error("the network returns no " + name.substr(end + 1) +
                               ": export it and the matcher together");
    values.push_back(of_one_image(found->second));
  }
  return run(matcher, values).at("score").GetTensorData<float>()[0];
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: %s NETWORK.onnx MATCHER.onnx FIRST_IMAGE SECOND_IMAGE\n", argv[0]);
    return 2;
  }
  try {
    cv::utils::logging::setLogLevel(cv::utils::logging::LOG_LEVEL_SILENT);
    const Ort::Env env(ORT_LOGGING_LEVEL_FATAL);
    Ort::Session network = open_model(env, argv[1]), matcher = open_model(env, argv[2]);
    check_resizes(network, argv[1]);
    Tensors first = describe(network, argv[3]), second = describe(network, argv[4]);
    std::printf("Similarity score between the two images is: %.5f\n", match(matcher, first, second));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}
