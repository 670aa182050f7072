// An accelerator that is none, torch.device("sim"): its memory is the machine's and its kernels are the CPU's, but torch
// treats it as it does a GPU, and it is stricter than one. What is refused here would be refused there, or go wrong:
// tensors of two devices in one operation, a generator of the CPU's, a collective on another process's device. Memory
// that nobody has written is NaN; and a copy to the CPU that need not be waited for arrives when somebody waits.
//
// For torch 2.13. It keeps to what torch offers to backends of others (PrivateUse1).

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <cstdlib>
#include <mutex>
#include <set>
#include <unordered_map>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::Stream;
using Tensors = std::vector<Tensor>;
constexpr auto SIM = c10::DeviceType::PrivateUse1;
constexpr auto CPU = c10::DeviceType::CPU;

size_t setting(const char* name, size_t otherwise) {
  const char* said = std::getenv(name);
  return said ? std::strtoull(said, nullptr, 10) : otherwise;
}
DeviceIndex device_count() {
  static const auto count = static_cast<DeviceIndex>(setting("SIM_DEVICES", 2));
  return count;
}
size_t memory_of_a_device() {
  static const size_t bytes = setting("SIM_MEMORY", 1ull << 34);
  return bytes;
}
thread_local DeviceIndex current = 0;

DeviceIndex or_current(DeviceIndex index) { return index < 0 ? current : index; }

// Memory

struct Allocator final : c10::DeviceAllocator {
  std::mutex mutex;
  bool is_used = false;
  std::array<c10::CachingDeviceAllocator::DeviceStats, 64> stats;
  std::unordered_map<void*, std::pair<size_t, DeviceIndex>> blocks;

  c10::CachingAllocator::Stat& allocated(DeviceIndex device) { return stats.at(device).allocated_bytes[0]; }

  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    if (bytes) {
      const std::lock_guard<std::mutex> lock(mutex);
      TORCH_CHECK_WITH(OutOfMemoryError, allocated(current).current + bytes <= memory_of_a_device(),
                       "SIM out of memory. Tried to allocate ", bytes, " bytes. GPU ", int(current), " has a total ...");
      TORCH_CHECK(posix_memalign(&data, 64, bytes) == 0, "the machine has no memory left");
      std::memset(data, 0xFF, bytes);  // NaN, in every floating-point format
      allocated(current).increase(bytes);
      is_used = true;
      blocks[data] = {bytes, current};
    }
    return {data, data, &release, Device(SIM, current)};
  }
  static void release(void* data);
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override { return stats.at(device); }
  void resetAccumulatedStats(DeviceIndex device) override { allocated(device).reset_accumulated(); }
  void resetPeakStats(DeviceIndex device) override { allocated(device).reset_peak(); }
};
Allocator& allocator() {
  static auto* it = new Allocator;
  return *it;
}
void Allocator::release(void* data) {
  if (!data) return;
  auto& self = allocator();
  const std::lock_guard<std::mutex> lock(self.mutex);
  const auto found = self.blocks.find(data);
  self.allocated(found->second.second).decrease(found->second.first);
  self.blocks.erase(found);
  std::free(data);
}

// Pinned memory is any of the CPU's, with a list of what is.

struct Pinned final : c10::Allocator {
  std::mutex mutex;
  std::set<const void*> blocks;

  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    if (bytes) {
      TORCH_CHECK(posix_memalign(&data, 64, bytes) == 0, "the machine has no memory left");
      const std::lock_guard<std::mutex> lock(mutex);
      blocks.insert(data);
    }
    return {data, data, &release, Device(CPU)};
  }
  static void release(void* data);
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool has(const void* data) {
    const std::lock_guard<std::mutex> lock(mutex);
    return blocks.count(data) > 0;
  }
};
Pinned& pinned() {
  static auto* it = new Pinned;
  return *it;
}
void Pinned::release(void* data) {
  const std::lock_guard<std::mutex> lock(pinned().mutex);
  pinned().blocks.erase(data);
  std::free(data);
}

// Copies to the CPU that nobody has waited for yet: (to, from).

std::mutex copies_mutex;
std::vector<std::pair<Tensor, Tensor>> copies;

void synchronize() {
  std::vector<std::pair<Tensor, Tensor>> arriving;
  {
    const std::lock_guard<std::mutex> lock(copies_mutex);
    arriving.swap(copies);
  }
  for (auto& [to, from] : arriving) to.copy_(from);
}

// Devices, streams (each has one, and it is never behind), events

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return SIM; }
  Device getDevice() const override { return {SIM, current}; }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < device_count(), "sim: there is no device ", int(device.index()));
    current = or_current(device.index());
  }
  void uncheckedSetDevice(Device device) const noexcept override { current = or_current(device.index()); }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return device_count(); }
  Stream getStream(Device device) const override {
    return Stream(Stream::DEFAULT, Device(SIM, or_current(device.index())));
  }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getStream(device); }
  Stream getNewStream(Device device, int) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return getStream(stream.device()); }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { synchronize(); }
  void synchronizeDevice(DeviceIndex) const override { synchronize(); }
  void record(void**, const Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { synchronize(); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// Random numbers: each device has a generator of its own.

struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(DeviceIndex index) {
    device_ = Device(SIM, index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};
const at::Generator& default_generator(DeviceIndex index) {
  static const std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (DeviceIndex i = 0; i < device_count(); ++i) made.push_back(at::make_generator<Generator>(i));
    return made;
  }();
  return all.at(or_current(index));
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count() > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return device_count(); }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex device) const override { Guard().setDevice({SIM, device}); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    return Guard().exchangeDevice({SIM, device}).index();
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  Device getDeviceFromPtr(void*) const override { return {SIM, current}; }
  bool isPinnedPtr(const void* data) const override { return pinned().has(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned(); }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<Generator>(or_current(index));
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto data = allocator().allocate(bytes);
    std::memcpy(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

// Kernels: these few, and the CPU's for all others.

Tensor as_cpu(const Tensor& x) {  // the same memory
  if (x.device().type() != SIM) return x;
  Tensor seen = at::from_blob(x.data_ptr(), x.sizes(), x.strides(), [x](void*) {}, x.options().device(CPU), Device(CPU));
  if (x.is_conj()) seen = at::_conj(seen);
  return x.is_neg() ? at::_neg_view(seen) : seen;
}

constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device.value_or(Device(SIM, current)));
  return at::detail::empty_generic(size, &allocator(), KEYS, c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(device.value_or(Device(SIM, current)));
  return at::detail::empty_strided_generic(size, stride, &allocator(), KEYS, c10::dtype_or_default(dtype));
}
Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  if (non_blocking && to.is_cpu() && from.sizes() == to.sizes()) {
    const std::lock_guard<std::mutex> lock(copies_mutex);
    copies.emplace_back(to, as_cpu(from).clone());
  } else {
    as_cpu(to).copy_(as_cpu(from));
  }
  return to;
}
Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}
at::Scalar local_scalar_dense(const Tensor& x) { return as_cpu(x).item(); }
const Tensor& resize(const Tensor& x, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(x, C10_AS_INTARRAYREF_SLOW(size), format);
}
Tensor& set_source(Tensor& x, at::Storage source) { return at::native::set_(x, source); }
int64_t plain_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                        std::optional<double>, bool) {
  return 0;
}

const std::set<std::string> MAY_MIX = {"aten::index.Tensor", "aten::_index_put_impl_"};  // the index may be the CPU's

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto arguments = torch::jit::last(*stack, schema.arguments().size());
  const auto name = c10::toString(op.operator_name());
  std::optional<Device> device;
  bool mixed = false;
  const auto look = [&](const Tensor& x) {
    if (!x.defined()) return;
    mixed |= x.device().type() == SIM ? device && *device != x.device() : x.dim() > 0;
    if (x.device().type() == SIM) device = x.device();
  };
  std::optional<size_t> generator;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& value = arguments[i];
    if (value.isTensor()) look(value.toTensor());
    if (value.isTensorList()) for (const Tensor& x : value.toTensorList()) look(x);
    if (value.isOptionalTensorList()) {
      for (const std::optional<Tensor>& x : value.toOptionalTensorList()) look(x.value_or(Tensor()));
    }
    if (schema.arguments()[i].name() == "generator") generator = i;
  }
  TORCH_CHECK(!device || !mixed || MAY_MIX.count(name), name, ": tensors must be on one device, ", *device);
  if (!generator) return at::native::cpu_fallback(op, stack);
  // The CPU's kernels draw from the CPU's generator: for as long as they do it is this device's.
  auto& given = (*stack)[stack->size() - arguments.size() + *generator];
  at::Generator own = given.isNone() ? default_generator(device ? device->index() : -1) : given.toGenerator();
  TORCH_CHECK(own.device().type() == SIM, name, ": expected a generator of sim, found one of ", own.device());
  given = c10::IValue();
  at::Generator cpu = at::detail::getDefaultCPUGenerator();
  const Tensor before = cpu.get_state();
  cpu.set_state(own.get_state());
  at::native::cpu_fallback(op, stack);
  own.set_state(cpu.get_state());
  cpu.set_state(before);
}

// Collectives: gloo's, on copies in the memory of the CPU.

struct Done final : c10d::Work {
  Tensors results;
  explicit Done(Tensors results) : results(std::move(results)) { finish(); }
  bool wait(std::chrono::milliseconds) override { return true; }
  Tensors result() override { return results; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    auto future = c10::make_intrusive<c10::ivalue::Future>(
        c10::ListType::create(c10::TensorType::get()), std::vector<Device>{results.at(0).device()});
    future->markCompleted(c10::IValue(results));
    return future;
  }
};

struct Staged final : c10d::Backend {
  using Future = c10::intrusive_ptr<c10d::Work>;
  c10::intrusive_ptr<c10d::Backend> gloo;
  c10::intrusive_ptr<Options> options = c10::make_intrusive<Options>("staged");

  explicit Staged(c10::intrusive_ptr<c10d::Backend> gloo) : Backend(gloo->getRank(), gloo->getSize()), gloo(gloo) {}
  const std::string getBackendName() const override { return "staged"; }
  c10::intrusive_ptr<Options> getBackendOptions() override { return options; }
  void setTimeout(std::chrono::milliseconds timeout) override { gloo->setTimeout(timeout); }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return 0; }

  static Tensors staged(const Tensors& xs) {
    Tensors held;
    for (const auto& x : xs) {
      TORCH_CHECK(x.device() == Device(SIM, current), "staged: a tensor of ", x.device(), " on device ", int(current));
      held.push_back(x.cpu());
    }
    return held;
  }
  static Future done(const Tensors& xs, const Tensors& held) {
    for (size_t i = 0; i < xs.size(); ++i) xs[i].copy_(held[i]);
    return c10::make_intrusive<Done>(xs);
  }
  Future broadcast(Tensors& xs, const c10d::BroadcastOptions& how) override {
    auto held = staged(xs);
    gloo->broadcast(held, how)->wait();
    return done(xs, held);
  }
  Future allreduce(Tensors& xs, const c10d::AllreduceOptions& how) override {
    auto held = staged(xs);
    gloo->allreduce(held, how)->wait();
    return done(xs, held);
  }
  Future allgather(std::vector<Tensors>& outs, Tensors& xs, const c10d::AllgatherOptions& how) override {
    auto held = staged(xs);
    std::vector<Tensors> all = {staged(outs.at(0))};
    gloo->allgather(all, held, how)->wait();
    return done(outs[0], all[0]);
  }
  Future _allgather_base(Tensor& out, Tensor& x, const c10d::AllgatherOptions& how) override {
    auto held = staged({out, x});
    gloo->_allgather_base(held[0], held[1], how)->wait();
    return done({out}, held);
  }
  Future _reduce_scatter_base(Tensor& out, Tensor& x, const c10d::ReduceScatterOptions& how) override {
    auto held = staged({out, x});
    gloo->_reduce_scatter_base(held[0], held[1], how)->wait();
    return done({out}, held);
  }
};

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &plain_attention);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("resize_", &resize);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", static_cast<Tensor (*)(const Tensor&, at::IntArrayRef)>(&at::native::view));
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
  m.impl("unfold", &at::native::unfold);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("set_.source_Storage", &set_source);
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
}
// A copy looks at these bits itself.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define HIGHER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) { AT_FORALL_LOWER_PRECISION_FP(LOWER) AT_FORALL_FP32(HIGHER) }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(SIM, &allocator());
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  m.def("device_count", [] { return int(device_count()); });
  m.def("current_device", [] { return int(current); });
  m.def("set_device", [](int index) { Guard().setDevice({SIM, static_cast<DeviceIndex>(index)}); });
  m.def("is_used", [] { return allocator().is_used; });
  m.def("memory", memory_of_a_device);
  m.def("default_generator", [](int index) { return default_generator(static_cast<DeviceIndex>(index)); });
  m.def("staged", [](c10::intrusive_ptr<c10d::Backend> gloo) -> c10::intrusive_ptr<c10d::Backend> {
    return c10::make_intrusive<Staged>(std::move(gloo));
  });
}
