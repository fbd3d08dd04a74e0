// The C functions of driver.cpp that python.cpp calls too.
#pragma once
#include "abi.h"

extern "C" {
int64_t tw_forward(const int64_t* spec, const int64_t* call);
int64_t tw_gradients_begin(const int64_t* spec, const int64_t* call, const int64_t* wanted, int64_t* counts, void** handle);
int64_t tw_gradients_fill(const int64_t* spec, const int64_t* call, void* handle, int64_t* const* rows, char* const* values,
                          int64_t by_row, void (*first)(void*), void* with);
void tw_gradients_drop(void* handle);
int64_t tw_update(const int64_t* spec, const int64_t* call, const int64_t* wanted, const tw::UpdateArg* updates);
int64_t tw_update_from_sparse(int64_t dtype, int64_t threads, int64_t tables, const tw::SparseArg* args,
                              const tw::UpdateArg* updates);
}
