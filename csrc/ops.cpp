// The schemas of torch.ops.bvae, all in one place, and the module that Python imports to register them.
// bvae/ops.py adds the fake kernels and autograd; docs/ops.md is the contract.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "ops.h"

STABLE_TORCH_LIBRARY(bvae, m) {
  m.def(
      "sample_kl(Tensor mu, Tensor log_sigma, Tensor(a!) rng, int first_sample, bool advance) "
      "-> (Tensor z, Tensor kl, Tensor moments, Tensor state)");
  m.def(
      "sample_kl_backward(Tensor? grad_z, Tensor? grad_kl, Tensor mu, Tensor log_sigma, Tensor state, "
      "int first_sample) -> (Tensor grad_mu, Tensor grad_log_sigma)");
  m.def("philox_words(Tensor rng, SymInt rows, SymInt k, int first_sample) -> Tensor");
  m.def("philox_normal(Tensor rng, SymInt rows, SymInt k, int first_sample) -> Tensor");
  m.def(
      "balanced_loss(Tensor recon, Tensor target, Tensor kl, Tensor(a!) gamma2, Tensor(b!) skipped, Tensor? weight, "
      "float kl_weight, bool logits, bool update, float decay, float floor, bool monotone) "
      "-> (Tensor loss, Tensor sse, Tensor stats, Tensor used)");
  m.def(
      "balanced_loss_backward(Tensor? grad_loss, Tensor? grad_sse, Tensor recon, Tensor target, Tensor used, "
      "float kl_weight, bool logits) -> (Tensor grad_recon, Tensor grad_kl)");
  m.def(
      "update_gamma2(Tensor(a!) gamma2, Tensor(b!) skipped, Tensor sse, Tensor count, float decay, float floor, "
      "bool monotone) -> ()");
  m.def("gather(Tensor data, Tensor index, Tensor? flip, ScalarType dtype) -> (Tensor x, Tensor rows)");
  m.def("all_finite(Tensor[] tensors) -> Tensor");
  m.def(
      "adam(Tensor(a!)[] parameters, Tensor?[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] halves, int[] halved, Tensor(e!) steps, Tensor good, Tensor lr, float beta1, float beta2, "
      "float eps) -> ()");
  m.def("copy_all(Tensor(a!)[] to, Tensor[] source) -> ()");
  m.def(
      "end_step(Tensor good, Tensor parts, Tensor? moments, Tensor(a!) sum_parts, Tensor(b!) sum_moments, "
      "Tensor(c!) counts, Tensor(d!) trouble, Tensor(e!)[] state, Tensor[] kept) -> ()");
  m.def(
      "batch_norm_relu(Tensor x, Tensor? offset, Tensor weight, Tensor bias, Tensor(a!) running_mean, "
      "Tensor(b!) running_var, Tensor(c!) running_weight, Tensor(d!) counters, float momentum, float eps, "
      "bool through) -> (Tensor y, Tensor through_x, Tensor statistics)");
  m.def(
      "batch_norm_relu_backward(Tensor grad, Tensor? grad_through, Tensor x, Tensor weight, Tensor bias, "
      "Tensor statistics, Tensor(a!) counters, bool offset_gradient) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_offset)");
  m.def("add_biased(Tensor a, Tensor b, Tensor bias_a, Tensor bias_b) -> Tensor");
  m.def("relu_grad(Tensor grad, Tensor y, Tensor(a!) counters) -> (Tensor grad_x, Tensor sums)");
  m.def("channel_sums(Tensor x, Tensor(a!) counters) -> (Tensor sums, Tensor again)");
}

// One function serves both devices. It is registered for CUDA in a CPU-only build too, where it names the remedy.
static void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("sample_kl", TORCH_BOX(&bvae::sample_kl));
  m.impl("sample_kl_backward", TORCH_BOX(&bvae::sample_kl_backward));
  m.impl("philox_words", TORCH_BOX(&bvae::philox_words));
  m.impl("philox_normal", TORCH_BOX(&bvae::philox_normal));
  m.impl("balanced_loss", TORCH_BOX(&bvae::balanced_loss));
  m.impl("balanced_loss_backward", TORCH_BOX(&bvae::balanced_loss_backward));
  m.impl("update_gamma2", TORCH_BOX(&bvae::update_gamma2));
  m.impl("gather", TORCH_BOX(&bvae::gather));
  m.impl("all_finite", TORCH_BOX(&bvae::all_finite));
  m.impl("adam", TORCH_BOX(&bvae::adam));
  m.impl("copy_all", TORCH_BOX(&bvae::copy_all));
  m.impl("end_step", TORCH_BOX(&bvae::end_step));
  m.impl("batch_norm_relu", TORCH_BOX(&bvae::batch_norm_relu));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&bvae::batch_norm_relu_backward));
  m.impl("add_biased", TORCH_BOX(&bvae::add_biased));
  m.impl("relu_grad", TORCH_BOX(&bvae::relu_grad));
  m.impl("channel_sums", TORCH_BOX(&bvae::channel_sums));
}

STABLE_TORCH_LIBRARY_IMPL(bvae, CPU, m) { register_kernels(m); }
STABLE_TORCH_LIBRARY_IMPL(bvae, CUDA, m) { register_kernels(m); }

static PyObject* cpu_capability(PyObject*, PyObject*) { return PyUnicode_FromString(bvae::cpu_loops().name); }

static PyMethodDef methods[] = {
    {"cpu_capability", cpu_capability, METH_NOARGS, "The instruction set of the CPU loops in use."},
    {nullptr, nullptr, 0, nullptr},
};

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "Registers torch.ops.bvae.", -1, methods,
                             nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
