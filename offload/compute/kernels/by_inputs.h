/* Matrices of 4 bits that are held by their inputs (GPTQ, AWQ), turned a tile of rows at a time. */
#pragma once

#include "weights.h"

enum { GPTQ = 9, AWQ = 10 };

INLINE int by_inputs(const Packed *m) { return m->format == GPTQ || m->format == AWQ; }

/* Which input comes at each place if those of a group stand together, into the first half of order [2 * columns]; more[1]
 * has the group of each input. Returns 0 if they stand so already, 1 if not, and -1 if the groups are not of block_columns
 * inputs each: then `order` says nothing. */
int order_of_groups(const Packed *m, int32_t *order);

/* Codes of `count` rows from `first`, a multiple of 8, on, into codes [count, columns / 2], two a byte, the low half first;
 * in the order of more[1] [columns] unless that is NULL. */
void codes_of_rows(const Packed *m, long first, long count, uint8_t *codes);
