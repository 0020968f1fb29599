/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0 */
#define CONFIG_BPF_SYSCALL 1
