/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0 */
/* Goes into a program's "version" section, which the kernel reads for kprobes only.
 * It also tells bcc's helpers.h which helpers to declare.
 */
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE KERNEL_VERSION(6, 1, 0)
