/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0 */
/* Only a unit here: bcc multiplies a ring's page count by it. */
#define PAGE_SIZE 4096
