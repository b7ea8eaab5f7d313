/* The note by which loaders know where a kernel wants to be entered in 32-bit mode (Xen's PVH, type 18). */

    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad pvh_start
